from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_train.data.batches import Batch, rank_slice
from moe_train.data.options import BlendMember, DataOptions, Stage
from moe_train.data.steps import StepReader
from moe_train.data.training_set import TrainingSet, open_training_set

Write = Callable[..., list[np.ndarray]]


@pytest.fixture(params=["packed", "reset", "documents", "pack"])
def samples(request: pytest.FixtureRequest, tmp_path: Path, write_tokens: Write) -> TrainingSet:
    """Two data sets, one in shards, whose shares change at step 5; small, so that epochs end within the test."""
    rng = np.random.default_rng(8)
    write_tokens(tmp_path / "a", rng.integers(0, 30, 40).tolist(), seed=1)
    write_tokens(tmp_path / "b", rng.integers(0, 30, 30).tolist(), seed=2, cuts=[7])
    blend: list[str | BlendMember] = [
        BlendMember(str(tmp_path / name), weight) for name, weight in (("a", 2), ("b", 1))
    ]
    options = DataOptions(
        train=blend,
        stages=[Stage(5, str(tmp_path / "b"))],
        sequence_length=16,
        sampler="documents" if request.param in ("documents", "pack") else "packed",
        reset_at_documents=request.param == "reset",
        pack_documents=request.param == "pack",
    )
    return open_training_set(options, seed=3, batch_size=24, cache=tmp_path / "cache", once=lambda work: work())


def same(left: Batch, right: Batch) -> bool:
    pairs = [(value, getattr(right, name)) for name, value in vars(left).items()]
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("ahead", [1, 16 * 24 * 3, 16 * 24 * 20])
def test_steps_read_ahead_are_those_read_one_by_one(
    samples: TrainingSet, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, after a jump, and by a new reader in the middle; a read holds one step, some, or all of them."""
    monkeypatch.setattr("moe_train.data.steps._TOKENS_AT_ONCE", ahead)
    monkeypatch.setattr("moe_train.data.steps._LOCATED_AT_ONCE", 3 * 24)
    rng = np.random.default_rng(ahead)
    for dp_size, micro_size in ((1, 24), (1, 1), (2, 3), (4, 2), (8, 3)):
        rank = int(rng.integers(dp_size))
        shape = {"batch_size": 24, "micro_size": micro_size, "rank": rank, "dp_size": dp_size}
        reader = StepReader(samples, **shape)
        begin = int(rng.integers(10))
        for step in [*range(12), begin, begin + 1, 0]:
            if step == begin:
                reader = StepReader(samples, **shape)
            found = reader.batches(step)
            assert len(found) == 24 // (dp_size * micro_size)
            for index, batch in enumerate(found):
                start = rank_slice(step * 24, index, rank, dp_size, micro_size)
                assert batch.sample_B.tolist() == list(range(start, start + micro_size))
                assert same(batch, samples.batch(start, micro_size))


def test_reads_are_few(samples: TrainingSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many samples and tokens of the rank at a time as there should be, however many ranks share a step."""
    monkeypatch.setattr("moe_train.data.steps._LOCATED_AT_ONCE", 50)
    monkeypatch.setattr("moe_train.data.steps._TOKENS_AT_ONCE", 16 * 24)
    calls: list[tuple[str, int]] = []
    locate, read = samples.locate, samples.read
    monkeypatch.setattr(samples, "locate", lambda index: calls.append(("locate", len(index))) or locate(index))
    monkeypatch.setattr(samples, "read", lambda index, *at: calls.append(("read", len(index))) or read(index, *at))
    reader = StepReader(samples, batch_size=24, micro_size=3, rank=1, dp_size=4)
    for step in range(13):
        reader.batches(step)
    # Four steps of 6 samples are a read, three reads the 50 samples that are located.
    assert calls == [("locate", 72), ("read", 24), ("read", 24), ("read", 24), ("locate", 72), ("read", 24)]


def test_a_step_may_be_larger_than_what_is_read_at_once(samples: TrainingSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_train.data.steps._LOCATED_AT_ONCE", 1)
    monkeypatch.setattr("moe_train.data.steps._TOKENS_AT_ONCE", 1)
    reader = StepReader(samples, batch_size=24, micro_size=2)
    for step in (0, 1, 2, 2):
        for index, batch in enumerate(reader.batches(step)):
            assert same(batch, samples.batch(step * 24 + 2 * index, 2))
