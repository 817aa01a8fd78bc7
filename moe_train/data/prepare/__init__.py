"""Text to tokens: cut into pieces, done by any number of processes, put together again. See docs/data.md."""

from moe_train.data.prepare.options import PrepareOptions
from moe_train.data.prepare.run import prepare
from moe_train.data.prepare.tasks import How, Progress

__all__ = ["How", "PrepareOptions", "Progress", "prepare"]
