"""moe-train tokenizer train, as a script."""

import sys

from moe_train.cli import main

raise SystemExit(main(["tokenizer", "train", *sys.argv[1:]]))
