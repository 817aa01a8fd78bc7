"""moe-train generate, as a script."""

import sys

from moe_train.cli import main

raise SystemExit(main(["generate", *sys.argv[1:]]))
