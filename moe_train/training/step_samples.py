"""Which samples a step of a run read, which of them a rank, and the data that they come from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_train.data.batches import rank_slice
from moe_train.data.identity import differences
from moe_train.data.training_set import TrainingSet, open_training_set, read_before
from moe_train.training.guard.left_out import left_out, read_rewinds
from moe_train.training.history import Stretch, last_step, read_history, stretch_of
from moe_train.training.run_config import RunConfig, from_dict
from moe_train.training.run_folder import METRICS, index_folder


@dataclass(frozen=True)
class StepSamples:
    """What an optimizer step read."""

    step: int
    """From 1, as in the metrics."""
    stretch: Stretch
    """Who took it: this run, or one whose checkpoint it began with."""
    config: RunConfig
    indices: list[int]
    """The samples; of a rank in the order of its micro-batches."""

    @property
    def ranks(self) -> int:
        """Data-parallel ranks that shared them."""
        return self.config.data_parallel_size(self.stretch.processes)


def samples_of_step(run_dir: Path, step: int, rank: int | None = None) -> StepSamples:
    """The samples that the step read whose result the run goes on from; with a data-parallel rank, its own.

    Errors: ValueError where the run has no such step, has not taken it yet or has no record of it, or had no such rank.
    """
    stretch = stretch_of(run_dir, step)
    config = from_dict(stretch.config, source=f"the configuration of {stretch.run}")
    size, micro = config.train.global_batch_size, config.train.micro_batch_size
    start = (step - 1) * size
    if rank is None:
        return StepSamples(step, stretch, config, list(range(start, start + size)))
    ranks = config.data_parallel_size(stretch.processes)
    if not 0 <= rank < ranks:
        raise ValueError(f"step {step} was taken on data-parallel ranks 0 to {ranks - 1}, not {rank}")
    firsts = [rank_slice(start, m, rank, ranks, micro) for m in range(config.accumulation_steps(stretch.processes))]
    return StepSamples(step, stretch, config, [first + row for first in firsts for row in range(micro)])


def not_learned(found: StepSamples) -> str:
    """Why nothing was learned from a step, where the guard of its run (docs/guard.md) did not let it; else empty."""
    run = Path(found.stretch.run)
    if left_out(read_rewinds(run), found.step):
        return "left out since a rewind, its samples were not read again"
    for line in (run / METRICS).read_text(encoding="utf-8").splitlines() if (run / METRICS).is_file() else []:
        # Most lines are long, and only few are of this kind.
        if '"guard"' in line and line.endswith("}"):  # the last one may be cut off
            record = json.loads(line)
            if (record["kind"], record.get("bad_step"), record.get("action")) == ("guard", found.step, "skip"):
                return f"skipped, nothing was learned from it: {record['message']}"
    return ""


def step_of_sample(run_dir: Path, index: int) -> int:
    """The step (from 1) that has read a sample of a run. ValueError where none has yet."""
    if index < 0:
        raise ValueError(f"samples are counted from 0: there is no sample {index}")
    history = read_history(run_dir)
    # The same in the whole history: no run goes on from a checkpoint with another batch.
    size, planned = (int(history[-1].config["train"][key]) for key in ("global_batch_size", "steps"))
    taken = last_step(run_dir, history)
    if index < taken * size:
        return index // size + 1
    read = f"{run_dir} has read no sample yet"
    if taken:
        read = f"{run_dir} has read {taken * size} samples, 0 to {taken * size - 1}, in {taken} steps of {size}"
    more = f"it is to read {planned * size}" + (
        ": wait, or go on with it by --resume auto" if index < planned * size else ""
    )
    raise ValueError(f"{read}, not sample {index}; {more}")


@contextmanager
def open_samples(run_dir: Path, found: StepSamples) -> Iterator[TrainingSet]:
    """The data that a step read, as long as the body runs. Writes nothing into the folders of the run.

    Errors: ValueError where it is not what it was then.
    """
    with tempfile.TemporaryDirectory() as cache:
        # What the run has an index of is read there; other data gets one that goes again. Names say which data it is.
        for index in index_folder(found.config, run_dir).glob("*.index"):
            (Path(cache) / index.name).symlink_to(index.resolve())
        yield _open(found, Path(cache))


def _open(found: StepSamples, cache: Path) -> TrainingSet:
    config, stretch = found.config, found.stretch
    try:
        samples = open_training_set(
            config.data,
            seed=config.seed,
            batch_size=config.train.global_batch_size,
            cache=cache,
            once=lambda work: work(),
        )
    except FileNotFoundError as error:
        raise ValueError(f"the data of step {found.step}, which {stretch.run} took, is not at hand: {error}") from None
    read = found.step * config.train.global_batch_size
    changed = differences(read_before(stretch.samples, read), read_before(samples.identity(), read))
    if changed:
        raise ValueError(
            f"the data is not what step {found.step} of {stretch.run} read ({'; '.join(changed)}): bring back the data "
            "sets as they were"
        )
    return samples
