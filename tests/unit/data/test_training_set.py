from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_train.data.batches import rank_slice
from moe_train.data.options import BlendMember, DataOptions, Stage
from moe_train.data.training_set import TrainingSet, open_training_set, read_before

Write = Callable[..., list[np.ndarray]]
SIZE = 8
"""Samples of a step."""


def opened(options: DataOptions, folder: Path, seed: int = 3) -> TrainingSet:
    return open_training_set(options, seed=seed, batch_size=SIZE, cache=folder / "cache", once=lambda work: work())


def blend(folder: Path, **weights: float) -> list[str | BlendMember]:
    return [BlendMember(str(folder / name), weight) for name, weight in weights.items()]


@pytest.fixture
def data(tmp_path: Path, write_tokens: Write) -> Path:
    """Three data sets with ids of their own, c in two shards."""
    rng = np.random.default_rng(1)
    for number, (name, documents) in enumerate((("a", 40), ("b", 15), ("c", 20))):
        lengths = rng.integers(0, 30, documents).tolist()
        write_tokens(tmp_path / name, lengths, seed=number, cuts=[9] if name == "c" else None)
    return tmp_path


def configurations(folder: Path) -> list[DataOptions]:
    mixed = blend(folder, a=0.5, b=0.2, c=0.3)
    stages = [Stage(3, blend(folder, b=1, c=1)), Stage(7, str(folder / "a"))]
    common = {"train": mixed, "stages": stages, "sequence_length": 16}
    return [
        DataOptions(train=str(folder / "c"), sequence_length=16),
        DataOptions(**common),
        DataOptions(**common, reset_at_documents=True, shuffle=False),
        DataOptions(**common, sampler="documents"),
        DataOptions(**common, sampler="documents", pack_documents=True),
    ]


@pytest.mark.parametrize("number", range(5))
def test_a_step_reads_the_same_samples_on_any_number_of_ranks_and_after_a_resume(data: Path, number: int) -> None:
    """pitfalls row 33 (entrenar#294, litgpt PR1160, levanter#311, datasets#5454, lhotse#1080): a run that stops after
    any step goes on with the same samples on another number of data-parallel ranks."""
    options = configurations(data)[number]
    whole = opened(options, data)
    expected = [whole.batch(step * SIZE, SIZE) for step in range(12)]
    layouts = itertools.cycle([(1, 8), (2, 4), (2, 1), (4, 2), (8, 1)])
    for step in (0, 2, 3, 6, 7, 11, 5):
        # A new process each time: nothing but the number of consumed samples goes over.
        training, (dp_size, micro_size) = opened(options, data), next(layouts)
        seen = set()
        for rank, micro in itertools.product(range(dp_size), range(SIZE // (dp_size * micro_size))):
            batch = training.batch(rank_slice(step * SIZE, micro, rank, dp_size, micro_size), micro_size)
            for row, sample in enumerate(batch.sample_B.tolist()):
                seen.add(sample)
                for name in ("ids_BS", "labels_BS", "target_BS", "padding_BS", "position_BS"):
                    ours, want = getattr(batch, name), getattr(expected[step], name)
                    assert (ours is None) == (want is None)
                    assert ours is None or ours[row].tolist() == want[sample - step * SIZE].tolist()
        assert seen == set(range(step * SIZE, (step + 1) * SIZE))
        # All micro-batches of a rank at once are the same ones.
        starts = [step * SIZE, step * SIZE + 6, step * SIZE + 2]
        for start, batch in zip(starts, training.batches(starts, 2), strict=True):
            alone = training.batch(start, 2)
            for name, value in vars(alone).items():
                assert value is None or value.tolist() == getattr(batch, name).tolist()
    assert opened(options, data).identity() == whole.identity()


def test_each_member_goes_on_through_the_stages(data: Path) -> None:
    """Over blends and stages, the samples of a data set are its own order from the beginning, none left out."""
    training = opened(configurations(data)[1], data)
    total = 12 * SIZE
    member_N, place_N = training.locate(np.arange(total))
    for number, sampler in enumerate(training.samplers):
        own = place_N[member_N == number].tolist()
        assert own == [sampler.place(index) for index in range(len(own))] and len(own) > 0
    assert training.samples_of(total).tolist() == [int((member_N == number).sum()) for number in range(3)]
    # Steps 3 to 6 read b and c alone, step 7 and later a.
    assert Counter(member_N[3 * SIZE : 7 * SIZE].tolist()) == {1: 16, 2: 16}
    assert set(member_N[7 * SIZE :].tolist()) == {0}
    # The first stage has its shares.
    counts = Counter(member_N[: 3 * SIZE].tolist())
    assert all(abs(counts[number] - 24 * share) < 1 for number, share in enumerate((0.5, 0.2, 0.3)))


def test_a_list_of_names_is_read_in_proportion_to_the_sizes(data: Path) -> None:
    names: list[str | BlendMember] = [str(data / name) for name in "abc"]
    training = opened(DataOptions(train=names, sequence_length=16), data)
    sizes = np.array([sampler.samples_per_epoch for sampler in training.samplers])
    assert training.samples_of(int(sizes.sum())).tolist() == sizes.tolist()


def test_a_member_alone_reads_as_it_would_in_a_blend_of_one(data: Path) -> None:
    alone = opened(DataOptions(train=str(data / "a"), sequence_length=16), data)
    blended = opened(DataOptions(train=blend(data, a=3), sequence_length=16), data)
    assert alone.batch(5, 40).ids_BS.tolist() == blended.batch(5, 40).ids_BS.tolist()


def test_identity_tells_what_decides_the_samples(data: Path, write_tokens: Write) -> None:
    base = configurations(data)[1]
    found = [opened(options, data).identity() for options in configurations(data)]
    found += [opened(base, data, seed=4).identity()]
    changed = {
        "train": blend(data, a=0.5, b=0.3, c=0.2),
        "stages": base.stages[:1],
        "sequence_length": 15,
        "shuffle": False,
        "reset_at_documents": True,
    }
    for key, value in changed.items():
        found.append(opened(DataOptions(**{**vars(base), key: value}), data).identity())
    moved = [*base.stages[:1], Stage(8, str(data / "a"))]
    found.append(opened(DataOptions(**{**vars(base), "stages": moved}), data).identity())
    before = opened(base, data).identity()
    write_tokens(data / "b", [5] * 30)
    found.append(opened(base, data).identity())
    assert all(left != right for left, right in itertools.combinations(found, 2))
    assert before == found[1]


def test_only_what_was_read_must_stay(data: Path) -> None:
    """Stages that begin later may change; those that have begun may not."""
    base = configurations(data)[1]
    before = opened(base, data).identity()
    for stages, first_difference in (
        (base.stages[:1], 7),
        ([*base.stages[:1], Stage(9, str(data / "b"))], 7),
        ([], 3),
        ([Stage(2, str(data / "a")), *base.stages], 2),
    ):
        now = opened(DataOptions(**{**vars(base), "stages": stages}), data).identity()
        for step in range(12):
            same = read_before(before, step * SIZE) == read_before(now, step * SIZE)
            assert same == (step <= first_difference)
    old = {"tokens": 5, "sequence_length": 16, "seed": 3, "shuffle": True}
    assert read_before(old, 100) == old


def test_start_up_says_what_is_read_of_each(data: Path) -> None:
    training = opened(configurations(data)[1], data)
    lines = training.describe(12 * SIZE).splitlines()
    assert len(lines) == 3
    for line, sampler, read in zip(lines, training.samplers, training.samples_of(12 * SIZE).tolist(), strict=True):
        assert f"{sampler.reader.dataset.token_count:,} tokens" in line
        assert f"{read / sampler.samples_per_epoch:.2f} epochs" in line
        assert ("not enough tokens for these steps" in line) == (read > sampler.samples_per_epoch)
    assert sum("not enough" in line for line in lines) in (1, 2, 3)


def test_bad_input(data: Path, write_tokens: Write) -> None:
    with pytest.raises(FileNotFoundError, match="no data set .*/d .*data sets there: .*/a, "):
        opened(DataOptions(train=str(data / "d")), data)
    with pytest.raises(ValueError, match="too small: it has .* tokens, fewer than one sample needs"):
        opened(DataOptions(train=str(data / "a"), sequence_length=10**6), data)
    write_tokens(data / "empty", [1, 0, 1])
    with pytest.raises(ValueError, match="too small: none of its 3 documents"):
        opened(DataOptions(train=str(data / "empty"), sampler="documents"), data)
    with pytest.raises(ValueError, match="start at 0, not -2"):
        opened(DataOptions(train=str(data / "a"), sequence_length=16), data).batch(-2, 1)
