"""moe-train inspect, as a script: text and origin of prepared data."""

import sys

from moe_train.cli import main

raise SystemExit(main(["inspect", *sys.argv[1:]]))
