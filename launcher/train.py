"""A worker process by hand: deepspeed launcher/train.py --config demo --run-dir runs/mine train.steps=20"""

from moe_train.training.worker import exit_now, main

if __name__ == "__main__":
    exit_now(main())
