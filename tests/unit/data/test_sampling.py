from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.data.indexed import IndexedDataset, IndexedWriter
from moe_train.data.permutation import permuted, permuted_many
from moe_train.data.readers import WindowReader
from moe_train.data.sampling import Sampler


def stream(prefix: Path, tokens: int, documents: int = 5, seed: int = 0) -> IndexedDataset:
    rng = np.random.default_rng(seed)
    with IndexedWriter(prefix, 1000) as writer:
        for part in np.array_split(rng.integers(0, 1000, tokens), documents):
            writer.add(part)
    return IndexedDataset(prefix)


@pytest.mark.parametrize("seed", [0, 1, -3])
def test_permutation_is_a_bijection(seed: int) -> None:
    for size in [*range(1, 80), 997, 4096]:
        assert sorted(permuted(i, size, seed, epoch=2) for i in range(size)) == list(range(size))


def test_permutation_differs_by_epoch_and_seed_and_looks_random() -> None:
    size = 2000
    orders = [np.array([permuted(i, size, s, e) for i in range(size)]) for s, e in [(0, 0), (0, 1), (1, 0)]]
    for index, left in enumerate(orders):
        for right in [np.arange(size), *orders[:index]]:
            # A random permutation agrees with another in about one place, and its correlation is about 1/sqrt(size).
            assert (left == right).sum() < 10
            assert abs(np.corrcoef(left, right)[0, 1]) < 0.1
        steps = np.diff(left)
        assert len(np.unique(steps)) > size / 2


def test_every_place_goes_everywhere() -> None:
    size, trials = 13, 2000
    counts = np.zeros((size, size))
    for seed in range(trials):
        for i in range(size):
            counts[i, permuted(i, size, seed, 0)] += 1
    expected = trials / size
    # 6 standard deviations of a binomial count.
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)


def test_large_range_needs_no_memory_per_sample() -> None:
    size = 10**13
    images = {permuted(i, size, 0, 0) for i in range(1000)}
    assert len(images) == 1000 and max(images) < size and max(images) > size // 2


def test_order_is_the_same_for_ever() -> None:
    """A run that resumes with a later version must go on with the same samples."""
    assert [permuted(i, 10, 0, 0) for i in range(10)] == GOLDEN


GOLDEN = [0, 3, 9, 2, 4, 7, 8, 6, 5, 1]


@given(size=st.integers(1, 5000), seed=st.integers(-(2**40), 2**40), epoch=st.integers(0, 2**40))
def test_the_vectorised_permutation_is_the_scalar_one_and_a_bijection(size: int, seed: int, epoch: int) -> None:
    images = permuted_many(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(images), np.arange(size))
    assert images[:200].tolist() == [permuted(i, size, seed, epoch) for i in range(min(size, 200))]


@given(size=st.integers(1, 2**62), data=st.data())
def test_the_permutations_agree_in_huge_ranges(size: int, data: st.DataObject) -> None:
    """Sums of 64-bit words overflow in numpy and not in Python."""
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    assert permuted_many(np.array(index), size, 3, 1).tolist() == [permuted(i, size, 3, 1) for i in index]


def test_places_are_those_of_single_indices_also_across_epochs(tmp_path: Path) -> None:
    for shuffle in (True, False):
        sampler = Sampler(WindowReader(stream(tmp_path / f"p{shuffle}", tokens=103), 8), seed=1, shuffle=shuffle)
        assert sampler.samples_per_epoch == 12
        index_N = np.random.default_rng(0).integers(0, 50, 30)
        assert sampler.places(index_N).tolist() == [sampler.place(int(index)) for index in index_N]
    assert [sampler.place(index) for index in range(30)] == [index % 12 for index in range(30)]
    with pytest.raises(ValueError, match="start at 0"):
        sampler.place(-1)


def test_an_epoch_has_each_place_once_and_the_next_has_another_order(tmp_path: Path) -> None:
    sampler = Sampler(WindowReader(stream(tmp_path / "p", tokens=801), 8), seed=1)
    assert sampler.samples_per_epoch == 100
    epochs = [[sampler.place(index) for index in range(e * 100, (e + 1) * 100)] for e in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("tokens", [0, 1, 8])
def test_less_than_one_sample_is_refused(tmp_path: Path, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"has {tokens} tokens, fewer than one sample needs .9 for"):
        Sampler(WindowReader(stream(tmp_path / "p", tokens), 8), seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        WindowReader(stream(tmp_path / "q", 20), 0)
