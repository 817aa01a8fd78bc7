"""Whether a checkpoint is of the model that asks for it."""

from __future__ import annotations

import pytest

from moe_train.checkpoint.loading import check_geometry


def test_the_same_geometry_passes() -> None:
    shapes = {"model.a": (2, 3), "exp_avg.a": (2, 3)}
    check_geometry(shapes, shapes, "here")


def test_kinds_that_nobody_wants_are_no_problem() -> None:
    """Weights alone from a checkpoint that holds moments and generators too."""
    check_geometry({"model.a": (2,), "exp_avg.a": (2,), "rng.0": (5,)}, {"model.a": (2,)}, "here")


@pytest.mark.parametrize(
    ("stored", "expected", "message"),
    [
        ({"model.a": (2,)}, {"model.a": (2,), "model.b": (3,)}, "missing in the checkpoint: model.b"),
        ({"model.a": (2,), "model.b": (3,)}, {"model.a": (2,)}, "not in this model: model.b"),
        (
            {"model.a": (2, 3)},
            {"model.a": (3, 2)},
            r"model.a: shape \(2, 3\) in the checkpoint, \(3, 2\) in this model",
        ),
    ],
)
def test_every_difference_is_named(
    stored: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=f"/runs/x is of another model(.|\n)*{message}(.|\n)*config.yaml"):
        check_geometry(stored, expected, "/runs/x")


def test_a_long_list_of_differences_is_cut() -> None:
    expected = {f"model.{i:03}": (1,) for i in range(25)}
    with pytest.raises(ValueError, match="and 15 more") as caught:
        check_geometry({}, expected, "here")
    assert "model.009" in str(caught.value) and "model.010" not in str(caught.value)
