"""The warning that a text has become long, as a person at a terminal reads it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class BeyondTraining(UserWarning):
    """A text has become longer than those that the model was trained on."""


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Ours in one line of ours, those of others not at all."""

    def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"moe-train: warning: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", BeyondTraining)
        warnings.showwarning = show_warning
        yield
