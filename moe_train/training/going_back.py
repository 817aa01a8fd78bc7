"""`--resume PATH` with a checkpoint of the run's own folder: what a start that dies early is to go on from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_train.checkpoint import store
from moe_train.checkpoint.state import read_state_with_config
from moe_train.data.files import write_atomically
from moe_train.parallel.first_rank import from_rank_0
from moe_train.parallel.passing import may_pass
from moe_train.training.run_folder import CHECKPOINTS


@contextmanager
def going_back(run_dir: Path, resume: str | None) -> Iterator[None]:
    """Makes PATH the latest checkpoint while the body builds the run and loads it; collective, rank 0's word counts.

    Restarts ask for the latest one. Without this, one whose first start died before it had loaded PATH would go on from
    the checkpoint that was to be left. A start that is refused, which nobody tries again, leaves `latest` as it was.
    """
    pointer = run_dir / CHECKPOINTS / store.LATEST
    before: list[bytes] = []
    from_rank_0(lambda: before.extend(_make_latest(pointer, resume)))
    try:
        yield
    except (OSError, ValueError) as error:
        if before and not may_pass(error):
            if before[0]:
                write_atomically(pointer, before[0])
            else:
                pointer.unlink(missing_ok=True)
        raise


def _make_latest(pointer: Path, resume: str | None) -> list[bytes]:
    """What was in the pointer, if it names another one now; b"" where there was none."""
    if resume is None or resume == "auto":
        return []
    directory = Path(resume).resolve()
    if not store.is_step(directory) or directory.parent != pointer.parent.resolve():
        return []
    try:
        if read_state_with_config(directory).get("weights_only"):
            return []
    except ValueError:
        return []  # loading will say what is wrong with it
    except OSError:
        pass  # the disk is away for a moment: a restart is to try this one again
    before = pointer.read_bytes() if pointer.exists() else b""
    store.point(directory, store.LATEST)
    return [before]
