from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_train.data.indexed import IndexedDataset, IndexedWriter
from moe_train.data.sampling import PackedSampler, permuted


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


def test_samples_are_windows_of_the_stream(tmp_path: Path) -> None:
    dataset = stream(tmp_path / "p", tokens=103)
    sampler = PackedSampler(dataset, 8, seed=1, shuffle=False)
    assert sampler.samples_per_epoch == 12
    for index in range(30):
        start = index % 12 * 8
        assert np.array_equal(sampler.sample(index), dataset.tokens[start : start + 9])
    assert sampler.sample(0).dtype == np.int64


def test_an_epoch_has_each_target_once_and_the_next_has_another_order(tmp_path: Path) -> None:
    dataset = stream(tmp_path / "p", tokens=801)
    sampler = PackedSampler(dataset, 8, seed=1)
    assert sampler.samples_per_epoch == 100
    epochs = [[sampler.window(index) for index in range(e * 100, (e + 1) * 100)] for e in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_sample_depends_on_nothing_but_its_index(tmp_path: Path) -> None:
    """pitfalls row 33 (entrenar#294, litgpt PR1160, levanter#311): resuming reads the same samples, without replay."""
    dataset = stream(tmp_path / "p", tokens=500)
    went_on = PackedSampler(dataset, 8, seed=3)
    samples = [went_on.sample(index) for index in range(150)]
    resumed = PackedSampler(dataset, 8, seed=3)
    for index in (149, 70, 3):
        assert np.array_equal(resumed.sample(index), samples[index])


@pytest.mark.parametrize("tokens", [0, 1, 8])
def test_less_than_one_sample_is_refused(tmp_path: Path, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"has {tokens} tokens, fewer than one sample needs .9 for"):
        PackedSampler(stream(tmp_path / "p", tokens), 8, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        PackedSampler(stream(tmp_path / "q", 20), 0, seed=0)


def test_epochs_of_a_run(tmp_path: Path) -> None:
    sampler = PackedSampler(stream(tmp_path / "p", tokens=81), 8, seed=0)
    assert sampler.epochs(25) == 2.5
    assert "2.50 epochs (not enough" in sampler.describe(25)
    assert "not enough" not in sampler.describe(10)
