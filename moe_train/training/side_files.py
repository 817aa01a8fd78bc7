"""Files of the run folder that training can do without."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from moe_train.training.options import CheckpointOptions


def spared(options: CheckpointOptions, what: str, write: Callable[[], object]) -> None:
    """Calls ``write``. Its OSError ends the run, or is only said where the run goes on without checkpoints too."""
    try:
        write()
    except OSError as error:
        if options.on_error == "stop":
            raise
        with suppress(OSError):  # the log may lie on the same disk
            print(f"moe-train: warning: cannot write {what}: {error}. The run goes on", file=sys.stderr, flush=True)
