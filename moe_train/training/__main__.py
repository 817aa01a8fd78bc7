"""``python -m moe_train.training``: one worker process, as launchers start it."""

from moe_train.training.worker import exit_now, main

if __name__ == "__main__":
    exit_now(main())
