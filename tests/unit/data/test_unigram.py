from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_train.data.dataset import open_dataset
from moe_train.data.unigram import unigram_entropy

Write = Callable[..., list[np.ndarray]]


def entropy_of(tokens: np.ndarray) -> float:
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize("tokens", [1, 999, 1000])
def test_all_tokens_are_counted_up_to_the_bound(
    tmp_path: Path, write_tokens: Write, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_train.data.unigram._MOST", 1000)
    monkeypatch.setattr("moe_train.data.unigram._CHUNK", 64)
    cuts = [2] if tokens > 1 else None
    documents = write_tokens(tmp_path / "p", [tokens // 3, tokens // 2, tokens - tokens // 3 - tokens // 2], cuts=cuts)
    found = unigram_entropy(open_dataset(tmp_path / "p"))
    assert found.nats == pytest.approx(entropy_of(np.concatenate(documents)), abs=1e-12) and found.sample is None


@pytest.mark.parametrize("tokens", [1001, 1650, 40_000])
def test_of_more_tokens_a_sample_from_everywhere(
    tmp_path: Path, write_tokens: Write, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows that do not overlap, first and last token among them; and each token is counted once."""
    monkeypatch.setattr("moe_train.data.unigram._MOST", 1000)
    monkeypatch.setattr("moe_train.data.unigram._WINDOW", 50)
    stream = np.concatenate(write_tokens(tmp_path / "p", [tokens // 2, tokens - tokens // 2], vocab=40, cuts=[1]))
    dataset = open_dataset(tmp_path / "p")
    seen: list[int] = []
    read = dataset.read
    monkeypatch.setattr(dataset, "read", lambda start, stop: seen.extend(range(start, stop)) or read(start, stop))
    found = unigram_entropy(dataset)
    assert found.sample == len(seen) == len(set(seen)) == 1000
    assert seen[0] == 0 and seen[-1] == tokens - 1
    assert np.ptp(np.diff(seen[::50])) <= 1, "at even distances"
    assert found.nats == pytest.approx(entropy_of(stream[seen]), abs=1e-12)
    assert unigram_entropy(dataset) == found


def test_nothing_to_count(tmp_path: Path, write_tokens: Write) -> None:
    write_tokens(tmp_path / "p", [0, 0])
    with pytest.raises(ValueError, match="holds no tokens"):
        unigram_entropy(open_dataset(tmp_path / "p"))
