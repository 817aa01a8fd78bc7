"""A small expert-load picture without a plotting library, so that training needs none.

Suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Share of an expert relative to perfect balance on a log2 scale: -2 (a quarter or less) blue, 0 white, +2 (four times
# or more) orange; the same colours as in the report.
_STOPS = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
_COLOURS = np.array([[31, 78, 121], [130, 170, 208], [247, 247, 245], [240, 168, 96], [179, 88, 6]], dtype=np.float64)
_DEAD = np.array([45, 45, 45], dtype=np.float64)


def relative_load(load_LE: Sequence[Sequence[int]]) -> np.ndarray:
    """float64 [L, E]: share of each expert times E; 1 is perfect balance. Zeros for a layer without any load."""
    counts = np.asarray(load_LE, dtype=np.float64)
    total = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts * counts.shape[-1], total, out=np.zeros_like(counts), where=total > 0)


def load_image(load_LE: Sequence[Sequence[int]], cell: int = 12) -> np.ndarray:
    """uint8 [L * cell, E * cell, 3]: one row of cells per layer, one cell per expert; unused experts dark grey."""
    relative = relative_load(load_LE)
    level = np.log2(np.maximum(relative, 2.0**-2))
    image = np.stack([np.interp(level, _STOPS, _COLOURS[:, c]) for c in range(3)], axis=-1)
    image[relative == 0] = _DEAD
    return np.repeat(np.repeat(image.round().astype(np.uint8), cell, axis=0), cell, axis=1)
