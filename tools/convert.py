"""moe-train convert, as a script."""

import sys

from moe_train.cli import main

raise SystemExit(main(["convert", *sys.argv[1:]]))
