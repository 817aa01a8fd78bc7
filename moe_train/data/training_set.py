"""The samples of a run: blends of data sets that follow each other, and the batches read from them.

Suffixes: M data sets, N samples of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.data.blend import Integers, Pattern
from moe_train.data.dataset import data_prefixes, sidecar_stem
from moe_train.data.index import OncePerNode
from moe_train.data.members import open_reader
from moe_train.data.options import Blend, DataOptions, all_names, members_of
from moe_train.data.rows import Batch, Rows
from moe_train.data.sampling import Sampler

_SEED_STEP = 1_000_003


@dataclass(frozen=True)
class _Stage:
    first: int
    """Its first sample."""
    pattern: Pattern
    members: Integers
    """[members of the blend] their numbers among all data sets of the run."""
    before: Integers
    """[data sets] samples that earlier stages have read of each."""


class TrainingSet:
    """Sample i of a run, for any i, as a function of the configuration: the state of training is the number of samples.

    samplers: the data sets by name.   stages: (first sample, weight by name) with rising first samples, the first 0. A
    data set that several stages name goes on in each where it stood.
    """

    def __init__(self, samplers: Mapping[str, Sampler], stages: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        self.names, self.samplers = list(samplers), list(samplers.values())
        self._restarts = any(sampler.reader.cuts for sampler in self.samplers)
        self._labelled = any(sampler.reader.domains is not None for sampler in self.samplers)
        first = self.samplers[0]
        self.seed, self.shuffle, self.sequence_length = first.seed, first.shuffle, first.reader.sequence_length
        self.stages: list[_Stage] = []
        for start, weights in stages:
            members = np.array([self.names.index(name) for name in weights], np.int64)
            self.stages.append(_Stage(start, Pattern(list(weights.values())), members, self.samples_of(start)))
        assert self.stages[0].first == 0

    def samples_of(self, samples: int) -> Integers:
        """[M] how many of the first `samples` of the run come from each data set."""
        if not self.stages:
            return np.zeros(len(self.names), np.int64)
        stage = max((stage for stage in self.stages if stage.first <= samples), key=lambda stage: stage.first)
        counts = stage.before.copy()
        counts[stage.members] += stage.pattern.counts_before(samples - stage.first)
        return counts

    def locate(self, index_N: Integers) -> tuple[Integers, Integers]:
        """Data set of each sample, and its place there (both [N])."""
        if index_N.size and int(index_N.min()) < 0:
            raise ValueError(f"sample indices start at 0, not {int(index_N.min())}")
        firsts = np.array([stage.first for stage in self.stages])
        stage_N = np.searchsorted(firsts, index_N, side="right") - 1
        member_N, ordinal_N = np.empty_like(index_N), np.empty_like(index_N)
        for number in np.unique(stage_N).tolist():
            stage, chosen = self.stages[number], stage_N == number
            local_N, within_N = stage.pattern.locate(index_N[chosen] - stage.first)
            member_N[chosen] = stage.members[local_N]
            ordinal_N[chosen] = stage.before[stage.members[local_N]] + within_N
        place_N = np.empty_like(index_N)
        for member in np.unique(member_N).tolist():
            chosen = member_N == member
            place_N[chosen] = self.samplers[member].places(ordinal_N[chosen])
        return member_N, place_N

    def batch(self, start: int, count: int) -> Batch:
        """Samples start <= index < start + count."""
        return self.batches([start], count)[0]

    def batches(self, starts: Sequence[int], count: int) -> list[Batch]:
        """The batch of so many samples from each start on; read at once, since a call costs as much as many rows."""
        index_N = (np.array(starts)[:, None] + np.arange(count)).reshape(-1)
        return self.read(index_N, *self.locate(index_N)).batches(count)

    def read(self, index_N: Integers, member_N: Integers, place_N: Integers) -> Rows:
        """The samples of these indices, from where `locate` says that they are."""
        rows = Rows(len(index_N), self.sequence_length, positions=self._restarts, domains=self._labelled)
        for member in set(member_N.tolist()):
            at = np.flatnonzero(member_N == member)
            self.samplers[member].reader.fill(rows, at, place_N[at])
        rows.sample_N = index_N
        return rows

    def identity(self) -> dict[str, Any]:
        """What decides which tokens sample i is, besides the tokens themselves; plain values for a checkpoint.

        Folders may move, so a data set is known by its last name and its size.
        """
        members = [
            {"name": Path(sidecar_stem(name)).name, **sampler.identity()}
            for name, sampler in zip(self.names, self.samplers, strict=True)
        ]
        return {
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "members": members,
            "stages": [
                {"first": stage.first, "members": stage.members.tolist(), "shares": stage.pattern.counts_M.tolist()}
                for stage in self.stages
            ],
        }

    def describe(self, samples: int) -> str:
        """A line per data set for the start of a run of so many samples."""
        lines = []
        for name, sampler, read in zip(self.names, self.samplers, self.samples_of(samples).tolist(), strict=True):
            epochs = sampler.epochs(read)
            line = f"{name}: {sampler.reader.dataset.token_count:,} tokens, {sampler.samples_per_epoch:,} samples; "
            line += f"the run reads {read:,} samples ({read / max(samples, 1):.1%}), {epochs:.2f} epochs"
            if read > sampler.samples_per_epoch:
                line += f" (not enough tokens for these steps: {epochs:.2f} epochs, tokens repeat)"
            lines.append(line)
        return "\n".join(lines)


def read_before(identity: dict[str, Any], samples: int) -> dict[str, Any]:
    """The part of an identity that decides the first `samples`: later stages may be added, changed or left out.

    An identity from before there were blends says nothing about data sets and stages; it is returned as it is.
    """
    if "stages" not in identity:
        return identity
    stages = [stage for stage in identity["stages"] if stage["first"] < samples]
    used = sorted({member for stage in stages for member in stage["members"]})
    # Data sets are numbered as stages name them, so that earlier numbers do not depend on later stages.
    return identity | {"stages": stages, "members": [identity["members"][number] for number in used]}


def open_training_set(
    options: DataOptions, *, seed: int, batch_size: int, cache: Path, once: OncePerNode
) -> TrainingSet:
    """Opens all data sets of a run.

    batch_size: samples of an optimizer step, in which stages are counted.   cache: folder for indexes.   once: see
    `index.open_index`.   Errors: FileNotFoundError, ValueError as from `open_dataset`, and where members of a blend
    were written by different tokenizers.
    """
    names = all_names(options)
    _check_distinct(names)
    # Data sets of one size must not be read in one order; the first keeps the run's own seed.
    samplers = {
        name: Sampler(open_reader(name, options, cache=cache, once=once), seed + number * _SEED_STEP, options.shuffle)
        for number, name in enumerate(names)
    }
    blends: list[tuple[int, Blend]] = [(0, options.train)]
    blends += [(stage.from_step * batch_size, stage.train) for stage in options.stages]
    return TrainingSet(
        samplers,
        [
            (
                first,
                {
                    name: samplers[name].samples_per_epoch if weight is None else weight
                    for name, weight in members_of(blend)
                },
            )
            for first, blend in blends
        ],
    )


def _check_distinct(names: Sequence[str]) -> None:
    """ValueError where two names stand for one data set: it would be read twice."""
    seen: dict[str, str] = {}
    for name in names:
        first = seen.setdefault(os.path.realpath(data_prefixes(name)[0]), name)
        if first != name:
            raise ValueError(f"data sets {first} and {name} are the same files; use one name for them everywhere")
