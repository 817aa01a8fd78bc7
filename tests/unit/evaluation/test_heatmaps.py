from __future__ import annotations

import numpy as np

from moe_train.evaluation.heatmaps import (
    domain_matrix,
    load_matrix,
    load_over_time,
    pair_matrices,
    pair_ratio,
    relative_load,
    shorten,
)
from moe_train.evaluation.plots import curves, k_histogram
from moe_train.evaluation.series import Series


def test_relative_load() -> None:
    np.testing.assert_allclose(relative_load([[2, 2], [3, 1], [0, 0]]), [[1, 1], [1.5, 0.5], [0, 0]])


def test_many_layers_are_thinned_and_said_so() -> None:
    records = [{"step": step, "load": [[1, 2, 3, 4]] * 40} for step in (1, 2, 3)]
    image, layers = load_over_time(records)
    assert image.startswith(b"\x89PNG") and len(layers) == 16 and layers[0] == 0 and layers[-1] == 39


def test_loads_of_zeros_do_not_warn(recwarn: object) -> None:
    load_over_time([{"step": 1, "load": [[0, 0, 0]]}])
    load_matrix([[0, 1, 0], [0, 0, 0]])
    domain_matrix({"a": {"load": [[0, 1]]}, "b": {"load": [[0, 0]]}})
    assert list(recwarn) == []  # type: ignore[call-overload]


def test_same_input_same_file() -> None:
    line = Series("x", [1, 2], [3.0, 4.0])
    assert curves("title", [line]) == curves("title", [line])


def test_names_with_dollars_are_no_formulas() -> None:
    load_over_time([{"step": 1, "load": [[1, 2]]}])
    domain_matrix({r"$\frac{": {"load": [[1, 2]]}})
    assert shorten("x" * 30) == "x" * 23 + "…"


def test_pairs_that_follow_the_loads_are_white() -> None:
    load = np.array([1.0, 2.0, 3.0, 4.0])
    pairs = 7 * np.outer(load, load)  # whatever the number of experts per token
    np.fill_diagonal(pairs, load)
    np.testing.assert_allclose(pair_ratio([pairs]), 1.0)


def test_pairs_that_never_or_always_meet() -> None:
    pairs = np.array([[[10, 10, 0, 0], [10, 10, 0, 0], [0, 0, 10, 10], [0, 0, 10, 10]], np.diag([10, 10, 10, 10])])
    ratio = pair_ratio(pairs)
    np.testing.assert_allclose(ratio[0], [[1, 3, 0, 0], [3, 1, 0, 0], [0, 0, 1, 3], [0, 0, 3, 1]])
    np.testing.assert_allclose(ratio[1], np.eye(4), err_msg="one expert per token has no pairs")
    assert np.isfinite(pair_ratio(np.zeros((1, 3, 3)))).all()


def test_figures_of_routing_are_drawn() -> None:
    pairs = np.random.default_rng(1).integers(0, 9, (3, 6, 6))
    assert pair_matrices((pairs + pairs.transpose(0, 2, 1)).tolist(), [1, 2, 5])[:4] == b"\x89PNG"
    assert b"<svg" in k_histogram([[0, 3, 5], [1, 2]], [0, 4])
