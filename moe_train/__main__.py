"""``python -m moe_train``: the command line."""

from moe_train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
