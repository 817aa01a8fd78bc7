"""Saves in the background, on every rank of a pool."""

from __future__ import annotations

import contextlib
import io
import threading
import unittest.mock
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_train.checkpoint import saver, shared, store
from moe_train.checkpoint.retention import Retention
from moe_train.checkpoint.saver import CheckpointError, Saver
from moe_train.training.checkpoints import Checkpoints, check_disk
from moe_train.training.engine import Engine
from moe_train.training.options import CheckpointOptions
from moe_train.training.state import run_slices, run_state
from tests.distributed.harness.checkpointing import Snapshot, snapshot
from tests.distributed.harness.training import Case, groups_of, make_engine, one_step


def begin_save(engine: Engine, to: Saver, step: int) -> None:
    state = run_state(engine, consumed=step * 16, tokens=step, samples={}, config={"name": "test"})
    to.save(step, run_slices(engine), state)


def train_while_it_writes(case: Case, root: str) -> tuple[Snapshot, Snapshot, list[str | None]]:
    """Saves after step 1 and trains two more steps before any rank may write a byte: what was to be saved, the end, and
    what polling said after each of the steps and once the files were written."""
    engine = make_engine(case, groups_of(case))
    records = [one_step(engine, case, 0)]
    wanted = snapshot(engine, [])
    may_write = threading.Event()
    real = saver.write_boxes

    def write_later(*args: Any) -> Any:
        assert may_write.wait(60)
        return real(*args)

    to = Saver(Path(root), asynchronous=True)
    polled: list[str | None] = []
    with unittest.mock.patch.object(saver, "write_boxes", write_later):
        begin_save(engine, to, 1)
        for step in (1, 2):
            records.append(one_step(engine, case, step))
            polled.append(_name(to.poll()))
        # One rank that has written is not enough.
        if dist.get_rank() == 0:
            may_write.set()
            assert to._running is not None and to._running.thread is not None
            to._running.thread.join()
        polled.append(_name(to.poll()))
        may_write.set()
        polled.append(_name(to.wait()))
    polled.append(_name(to.poll()))
    end = snapshot(engine, records)
    engine.close()
    return wanted, end, polled


def fail_once(case: Case, root: str, failing_rank: int) -> tuple[str, list[str], list[str | None]]:
    """Saves after steps 1, 2 and 3; in the second one a rank cannot write. What polling raised, which checkpoints there
    were then, and what came of the third."""
    engine = make_engine(case, groups_of(case))
    to = Saver(Path(root), Retention(newest=9), asynchronous=True)
    raised = ""
    there: list[str] = []
    last: list[str | None] = []
    for step in (1, 2, 3):
        one_step(engine, case, step - 1)
        full = unittest.mock.patch(
            "moe_train.checkpoint.writing._Stream.write", side_effect=OSError(28, "No space left")
        )
        with full if step == 2 and dist.get_rank() == failing_rank else contextlib.nullcontext():
            begin_save(engine, to, step)
            try:
                last.append(_name(to.wait()))
            except CheckpointError as error:
                raised, there = str(error), [str(store.latest(Path(root)))]
                last.append(None)
    engine.close()
    return raised, there, last


def blind_rank(case: Case, root: str) -> str:
    """What every rank raises when rank 1 does not see the folder that rank 0 has made."""
    engine = make_engine(case, groups_of(case))
    to = Saver(Path(root))
    one_step(engine, case, 0)
    elsewhere = Path(root) / "not shared"
    unseen = unittest.mock.patch.object(saver.store, "temporary_of", lambda final: elsewhere)
    try:
        with unittest.mock.patch.object(shared, "VISIBLE_WITHIN", 0.2):
            if dist.get_rank() == 1:
                with unseen:
                    begin_save(engine, to, 1)
            else:
                begin_save(engine, to, 1)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()
    return ""


def disks_of_two_nodes(root: str, on_error: str, is_shared: bool) -> tuple[str, str, list[str]]:
    """What is raised and printed before training, where each rank has a disk of its own or all the same; and what is
    left in this rank's folder."""
    folder = Path(root) if is_shared else Path(root) / f"node_{dist.get_rank()}"
    options = CheckpointOptions(on_error=on_error)  # type: ignore[arg-type]
    raised = ""
    printed = io.StringIO()
    with unittest.mock.patch.object(shared, "VISIBLE_WITHIN", 0.2), contextlib.redirect_stderr(printed):
        try:
            check_disk(options, folder / "run" / "checkpoints")
        except CheckpointError as error:
            raised = str(error)
    dist.barrier()  # rank 0 removes its file last
    return raised, printed.getvalue(), [path.name for path in folder.glob("run/*")]


def _name(path: Path | None) -> str | None:
    return None if path is None else path.name


def checkpoints_of_a_run(case: Case, root: str, on_error: str) -> tuple[list[dict[str, Any]], list[str], str]:
    """Saves after steps 1, 2 and 3, of which the second cannot be written; validations with losses 3, 4 and 2; then the
    end. The records, what is on disk, and what was raised."""
    engine = make_engine(case, groups_of(case))
    options = CheckpointOptions(keep=1, best=True, final_weights=True, on_error=on_error)  # type: ignore[arg-type]
    saves = Checkpoints(options, Path(root), engine)
    state: dict[str, Any] = {"consumed": 0, "tokens": 0, "samples": {}, "config": {"name": "test"}}
    records: list[dict[str, Any]] = []
    raised = ""
    full = unittest.mock.patch("moe_train.checkpoint.writing._Stream.write", side_effect=OSError(28, "No space left"))
    try:
        for step, loss in ((1, 3.0), (2, 4.0), (3, 2.0)):
            one_step(engine, case, step - 1)
            with full if step == 2 else contextlib.nullcontext():
                records += saves.save(step, state, last=step == 3, final=step == 3)
                records += saves.finish()
            records += saves.save_if_best(step, state, loss) + saves.finish()
        again = Checkpoints(options, Path(root), engine)
        again.restore_best()
        assert again.lowest_loss == 2.0
    except CheckpointError as error:
        raised = str(error)
    finally:
        engine.close()
    return records, sorted(path.name for path in Path(root).iterdir()), raised
