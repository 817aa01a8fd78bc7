from __future__ import annotations

import numpy as np

from moe_train.evaluation.heatmaps import domain_matrix, load_matrix, load_over_time, relative_load, shorten
from moe_train.evaluation.plots import curves
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
