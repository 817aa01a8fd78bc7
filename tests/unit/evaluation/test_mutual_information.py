from __future__ import annotations

import math

import numpy as np
import pytest

from moe_train.evaluation.mutual_information import domain_information


def test_each_domain_its_own_expert() -> None:
    found = domain_information([[10, 0, 0], [0, 20, 0], [0, 0, 30]])
    entropy = -sum(s * math.log(s) for s in (1 / 6, 1 / 3, 1 / 2))
    assert (
        found is not None and found["domain_nmi"] == pytest.approx(1) and found["domain_mi"] == pytest.approx(entropy)
    )


def test_no_preference() -> None:
    found = domain_information([[10, 20, 30], [1, 2, 3]])
    assert found is not None and found["domain_nmi"] == pytest.approx(0, abs=1e-12)


def test_against_entropies() -> None:
    load = np.random.default_rng().integers(0, 50, (4, 6))
    load[0, 0] = 7

    def entropy(counts: np.ndarray) -> float:
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log(share)).sum())

    found = domain_information(load.tolist())
    information = entropy(load.sum(1)) + entropy(load.sum(0)) - entropy(load.reshape(-1))
    assert found is not None and found["domain_mi"] == pytest.approx(information, abs=1e-9)
    expected = information / math.sqrt(entropy(load.sum(1)) * entropy(load.sum(0)))
    assert found["domain_nmi"] == pytest.approx(expected, abs=1e-9)


def test_unused_domains_and_experts_do_not_matter() -> None:
    plain = domain_information([[5, 3], [2, 9]])
    assert domain_information([[5, 0, 3], [0, 0, 0], [2, 0, 9]]) == plain


def test_floor_is_what_independent_slots_show() -> None:
    random = np.random.default_rng(3)
    found = []
    for _ in range(60):
        domain, expert = random.integers(0, 4, 2000), random.integers(0, 16, 2000)
        found.append(domain_information(np.histogram2d(domain, expert, (4, 16))[0].astype(int).tolist()))
    mean = sum(f["domain_nmi"] for f in found if f) / 60
    assert found[0] is not None and mean == pytest.approx(found[0]["domain_nmi_floor"], rel=0.1)


@pytest.mark.parametrize("load", [[], [[1, 2]], [[1, 2], [0, 0]], [[4, 0], [5, 0]]])
def test_nothing_to_tell(load: list[list[int]]) -> None:
    assert domain_information(load) is None


def test_impossible_counts() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        domain_information([[1, -1], [1, 1]])
