"""Training data on every rank of a pool."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from moe_train.data import index
from moe_train.data.batches import rank_slice
from moe_train.data.options import DataOptions
from moe_train.data.training_set import TrainingSet, open_training_set
from moe_train.evaluation.result import EvaluationResult
from moe_train.parallel.once import once_per_node
from moe_train.training.options import TrainOptions
from moe_train.training.run_config import RunConfig
from moe_train.training.step import train_step
from moe_train.training.validation import ValidationSet
from tests.distributed.harness.training import Case, build_model, groups_for, groups_of, make_engine


def open_on_nodes(options: DataOptions, folder: Path, node_of: list[int], broken: int = -1) -> dict[str, Any]:
    """Opens data whose index this rank's node does not have yet; returns what this rank has seen.

    ``node_of``: the node of each rank; each keeps its files in a folder of its own. ``broken``: a node where nothing
    can be written.
    """
    groups = groups_for(1)
    node = node_of[groups.rank]
    local_rank = node_of[: groups.rank].count(node)
    cache = folder / f"node_{node}"
    if node == broken and local_rank == 0:
        cache.write_text("a file where a folder should be")
    written = mock.Mock(wraps=index.write_index)
    samples: TrainingSet | None = None
    error = ""
    with mock.patch.dict(os.environ, LOCAL_RANK=str(local_rank)), mock.patch.object(index, "write_index", written):
        try:
            samples = open_training_set(options, seed=1, batch_size=8, cache=cache, once=once_per_node)
        except (ValueError, OSError) as problem:
            error = str(problem)
    if samples is None:
        return {"error": error, "writes": written.call_count}
    reader: Any = samples.samplers[0].reader
    held = reader.firsts if options.pack_documents else reader.documents
    return {
        "error": "",
        "writes": written.call_count,
        "ids": samples.batch(0, 40).ids_BS.numpy(),
        "mapped": isinstance(held.base, np.memmap) or isinstance(held.base.base, np.memmap),
        "bytes": sum(path.stat().st_size for path in cache.iterdir()),
        "samples": reader.count,
    }


def evaluate(case: Case, options: DataOptions, folder: Path, micro_batch: int) -> EvaluationResult:
    """Validation of a fresh model on ``options.validation``."""
    groups = groups_of(case)
    config = RunConfig(
        model=case.model, router=case.router, data=options, train=TrainOptions(micro_batch_size=micro_batch)
    )
    return ValidationSet(config, groups, options.validation, cache=folder).evaluate(build_model(case).eval())


@dataclass(frozen=True)
class Step:
    """What one rank knows of a step."""

    loss: float
    targets: int
    tokens: int
    load_LE: Any
    read: list[tuple[int, list[int], list[int]]]
    """Of each sample that this rank read, its number, ids and labels (padding left out)."""


def train(case: Case, options: DataOptions, folder: Path, first_step: int = 0) -> list[Step]:
    """The steps from ``first_step`` on of a fresh model."""
    groups = groups_of(case)
    engine = make_engine(case, groups)
    try:
        samples = open_training_set(options, seed=5, batch_size=case.sequences, cache=folder, once=once_per_node)
        size = case.sequences // groups.data_size // case.accumulation
        found = []
        for step in range(first_step, first_step + case.steps):
            starts = [
                rank_slice(step * case.sequences, micro, groups.data_rank, groups.data_size, size)
                for micro in range(case.accumulation)
            ]
            batches = samples.batches(starts, size)
            result = train_step(engine, batches, lr=case.optimizer.lr, seed=case.seed, step=step)
            read = [
                (int(number), ids[~padding].tolist(), labels[~padding].tolist())
                for batch in batches
                for number, ids, labels, padding in zip(
                    batch.sample_B, batch.ids_BS, batch.labels_BS, batch.padding_BS, strict=True
                )
            ]
            loss = result.loss_sum / result.loss_count
            found.append(Step(loss, result.loss_count, result.tokens, result.load_LE.numpy(), read))
        return found
    finally:
        engine.close()
