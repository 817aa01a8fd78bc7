"""moe-train prepare, as a script: parquet files to token files."""

import sys

from moe_train.cli import main

raise SystemExit(main(["prepare", *sys.argv[1:]]))
