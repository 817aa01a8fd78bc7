"""Composition from parts, order of precedence, overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.config.compose import EXPERIMENTS, compose, find_experiment, names, shipped_configs
from moe_train.config.errors import ConfigError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Configurations of a user: two kinds, two parts each, one experiment."""
    files = {
        "model/small.yaml": "model: {width: 8, depth: 2}\nshared: from model\n",
        "model/large.yaml": "model: {width: 64, depth: 2}\n",
        "train/short.yaml": "train: {steps: 5}\nshared: from train\n",
        "train/long.yaml": "train: {steps: 500, rate: 1e-3}\n",
        "experiments/mine.yaml": "parts: {model: small, train: short}\nmodel: {depth: 3}\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path / "experiments" / "mine.yaml"


def test_parts_in_order_then_own_keys(tree: Path) -> None:
    assert compose(str(tree)) == {
        "model": {"width": 8, "depth": 3},
        "shared": "from train",
        "train": {"steps": 5},
    }


def test_an_override_wins_over_everything(tree: Path) -> None:
    assert compose(str(tree), ["model.depth=9", "train.steps=7"])["model"] == {"width": 8, "depth": 9}


def test_a_part_is_replaced_whole(tree: Path) -> None:
    merged = compose(str(tree), ["parts.train=long", "parts.model=large"])
    assert merged == {"model": {"width": 64, "depth": 3}, "train": {"steps": 500, "rate": 0.001}}


def test_a_part_by_path(tree: Path) -> None:
    (tree.parent / "other.yaml").write_text("model: {width: 1}\n")
    assert compose(str(tree), ["parts.model=other.yaml"])["model"] == {"width": 1, "depth": 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1e-3", 0.001), ("true", True), ("null", None), ("x=y", "x=y"), ("[1,a]", [1, "a"]), ("'12'", "12")],
)
def test_overrides_are_typed_as_yaml(tree: Path, text: str, value: object) -> None:
    found = compose(str(tree), [f"a.b={text}"])["a"]["b"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["train.steps", "=3", "train..steps=3", ".steps=3"])
def test_a_malformed_override(tree: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        compose(str(tree), [text])


def test_an_unknown_part_names_the_nearest(tree: Path) -> None:
    with pytest.raises(ConfigError, match=r"parts\.router: no part 'softmax_tpok'.*did you mean softmax_topk"):
        compose(str(tree), ["parts.router=softmax_tpok"])


def test_an_unknown_kind_names_the_kinds(tree: Path) -> None:
    with pytest.raises(ConfigError, match=r"no kind 'ruoter'.*did you mean router"):
        compose(str(tree), ["parts.ruoter=lpr"])


@pytest.mark.parametrize("override", ["parts=tiny", "parts.model=[a]"])
def test_parts_of_a_wrong_type(tree: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="parts"):
        compose(str(tree), [override])


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "parts: 3\n", "a: 1\na: 2\n"])
def test_a_broken_file_is_a_readable_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        compose(str(path))


def test_a_reference_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "reference.yaml"
    path.write_text("a: ${b.c}\n")
    with pytest.raises(ConfigError, match=r"reference\.yaml"):
        compose(str(path))


def test_an_unknown_experiment_lists_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match=r"Did you mean demo\?.*tiny"):
        find_experiment("deom")


def test_every_shipped_experiment_finds_its_parts() -> None:
    shipped = names(EXPERIMENTS)
    assert {"demo", "tiny"} <= set(shipped)
    for name in shipped:
        assert compose(name)["name"] == name


def test_shipped_folders_hold_what_they_are_named_after() -> None:
    for kind in ("model", "router", "train", "data"):
        for name in names(kind):
            assert kind in compose(str(shipped_configs() / kind / f"{name}.yaml")), (kind, name)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"]
)
def test_a_tag_that_would_run_code_is_refused(tmp_path: Path, tag: str) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "mine.yaml"
    for text in (f"name: {tag} [{canary}]\n", f"name: x\ntrain: {{steps: {tag} [{canary}]}}\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no valid YAML"):
            compose(str(path))
        path.write_text("name: x\n")
        with pytest.raises(ConfigError, match="override"):
            compose(str(path), [f"train.steps={tag} [{canary}]"])
    assert not canary.exists()
