"""Saving and loading on every rank of a pool."""

from __future__ import annotations

import errno
import os
import shutil
import unittest.mock
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.checkpoint import store
from moe_train.checkpoint.retention import Retention
from moe_train.checkpoint.saver import Saver
from moe_train.training.engine import Engine
from moe_train.training.state import load_checkpoint, load_initial_weights, load_weights, run_slices, run_state
from tests.distributed.harness.training import (
    Case,
    Record,
    build_model,
    global_tensors,
    groups_of,
    local_part,
    make_engine,
    one_step,
    router_state,
)


@dataclass(frozen=True)
class Snapshot:
    """Everything that moves, as global tensors; tensors are on rank 0 only, gate state is this rank's own."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    buffers: dict[str, Tensor]
    optimizer_steps: int
    records: list[Record]


def snapshot(engine: Engine, records: list[Record]) -> Snapshot:
    return Snapshot(
        weights=global_tensors(engine),
        moments={kind: global_tensors(engine, kind) for kind in ("exp_avg", "exp_avg_sq")},
        buffers=router_state(engine.module),
        optimizer_steps=engine.optimizer_steps(),
        records=records,
    )


def save_at(engine: Engine, root: str, step: int, case: Case, keep: int = 5) -> None:
    tokens = case.sequences * case.length * step
    state = run_state(engine, consumed=case.sequences * step, tokens=tokens, samples={}, config={"name": "test"})
    Saver(Path(root), Retention(newest=keep)).save(step, run_slices(engine), state)


def train_and_save(case: Case, root: str, saves: list[int], until: int, keep: int = 5) -> Snapshot:
    """Trains from the start; after step k of ``saves`` writes a checkpoint."""
    engine = make_engine(case, groups_of(case))
    records = []
    for step in range(until):
        records.append(one_step(engine, case, step))
        if step + 1 in saves:
            save_at(engine, root, step + 1, case, keep)
    result = snapshot(engine, records)
    engine.close()
    return result


def draws_around_a_checkpoint(case: Case, root: str) -> list[Tensor]:
    """Random numbers of this rank's generator: after a save, after as many others, and after loading that save."""
    engine = make_engine(case, groups_of(case))
    one_step(engine, case, 0)
    torch.manual_seed(100 + engine.groups.rank)
    torch.rand(3)
    save_at(engine, root, 1, case)
    drawn = [torch.rand(5), torch.rand(5)]
    load_checkpoint(engine, Path(root) / "step_00000001")
    engine.close()
    return [*drawn, torch.rand(5)]


def resume(case: Case, directory: str, until: int) -> tuple[Snapshot, Snapshot, dict[str, Any]]:
    """A fresh engine with other initial weights, filled from the checkpoint: as loaded, and after further steps."""
    engine = make_engine(case.with_(seed=case.seed + 1), groups_of(case))
    state = load_checkpoint(engine, Path(directory))
    loaded = snapshot(engine, [])
    first = state["consumed_samples"] // case.sequences
    records = [one_step(engine, case, step) for step in range(first, until)]
    result = snapshot(engine, records)
    engine.close()
    return loaded, result, state


def weights_of_model(case: Case, directory: str, whole: dict[str, Tensor]) -> list[str]:
    """Loads weights into a plain model with other initial weights; names of what differs from ``whole``."""
    groups = groups_of(case)
    model = build_model(case.with_(seed=case.seed + 1))
    load_weights(model, groups, Path(directory))
    return [n for n, p in model.named_parameters() if not torch.equal(p, local_part(whole[n], p, groups))]


def begin_with(case: Case, directory: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights (on rank 0) and gate state of a fresh engine with other initial weights that begins with those of a
    checkpoint."""
    engine = make_engine(case.with_(seed=case.seed + 1), groups_of(case))
    load_initial_weights(engine, Path(directory))
    found = global_tensors(engine), router_state(engine.module)
    engine.close()
    return found


def error_of_load(case: Case, directory: str) -> tuple[str, str]:
    """Class and message of what loading raises on this rank."""
    engine = make_engine(case, groups_of(case))
    try:
        load_checkpoint(engine, Path(directory))
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        engine.close()
    return "", ""


def save_on_a_full_disk(case: Case, root: str, failing_rank: int | None, where: str) -> tuple[str, str]:
    """One good checkpoint after step 1, then a save that cannot be written. Class and message of what was raised.

    ``where``: "data" (writing tensors), "state" (the last file) or "device" (nothing is replaced: the disk is full).
    """
    engine = make_engine(case, groups_of(case))
    one_step(engine, case, 0)
    save_at(engine, root, 1, case)
    one_step(engine, case, 1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    target = {
        "data": ("moe_train.checkpoint.writing._Stream.write", full),
        "state": ("moe_train.checkpoint.store.write_atomically", full),
    }.get(where)
    try:
        if target is not None and dist.get_rank() == failing_rank:
            with unittest.mock.patch(target[0], side_effect=target[1]):
                save_at(engine, root, 2, case)
        else:
            save_at(engine, root, 2, case)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        engine.close()
    return "", ""


def fill(root: str, leave: int) -> None:
    """Rank 0 fills the file system of ``root`` but for ``leave`` bytes."""
    if dist.get_rank() == 0:
        free = shutil.disk_usage(root).free
        with open(Path(root, "filler"), "wb") as file:
            file.write(b"\0" * max(0, free - leave))
    dist.barrier()


def latest(root: str) -> str:
    directory = store.latest(Path(root))
    return "" if directory is None else directory.name
