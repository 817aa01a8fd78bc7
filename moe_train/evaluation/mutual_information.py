"""How much the domain of a token says about its experts.

Suffixes: D domains, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def domain_information(load_DE: Sequence[Sequence[int]]) -> dict[str, float] | None:
    """Mutual information between domain and expert over the slots, from exact counts.

    ``domain_mi`` = sum p(d, e) ln(p(d, e) / (p(d) p(e))) in nats; ``domain_nmi`` = that / sqrt(H(D) H(E)), 0 where the
    experts of a token do not depend on its domain, 1 where each tells the other (Strehl & Ghosh 2002, eq. 2);
    ``domain_nmi_floor``, what independent slots would show by chance, from the mean (D - 1)(E - 1) / (2 slots) of the
    plug-in estimate (Miller 1955), counting domains and experts that have slots. None with fewer than two of either.
    """
    if len(load_DE) < 2:
        return None
    counts_DE = np.asarray(load_DE, dtype=np.int64)
    if counts_DE.ndim != 2 or (counts_DE < 0).any():
        raise ValueError(f"counts must be at least 0 and stand as [domains, experts], not as {list(counts_DE.shape)}")
    counts_DE = counts_DE[counts_DE.sum(1) > 0][:, counts_DE.sum(0) > 0]
    if min(counts_DE.shape) < 2:
        return None
    total = int(counts_DE.sum())
    joint_DE = counts_DE / total
    domain_D, expert_E = counts_DE.sum(1) / total, counts_DE.sum(0) / total
    there_DE = counts_DE > 0
    ratio_DE = joint_DE[there_DE] / np.outer(domain_D, expert_E)[there_DE]
    information = max(0.0, math.fsum(joint_DE[there_DE] * np.log(ratio_DE)))
    scale = math.sqrt(_entropy(domain_D) * _entropy(expert_E))
    chance = (len(domain_D) - 1) * (len(expert_E) - 1) / (2 * total)
    return {
        "domain_mi": information,
        "domain_nmi": min(1.0, information / scale),
        "domain_nmi_floor": min(1.0, chance / scale),
    }


def _entropy(share_N: np.ndarray) -> float:
    return -math.fsum(share_N * np.log(share_N))
