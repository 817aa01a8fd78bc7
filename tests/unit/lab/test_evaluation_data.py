"""What would keep the evaluation from being made is said before the first run starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.data.indexed import IndexedWriter
from moe_train.data.manifest import manifest_path, token_bytes_path
from moe_train.lab.compare import Request, check_all_data, compare, prepare
from moe_train.lab.evaluation_data import check_evaluation_data
from moe_train.lab.plan import PlannedRun
from tests.unit.lab.experiments import FakeRunner, planned, write

VOCAB = 256


def data_set(stem: Path, *documents: list[int], tokenizer: str = "", ids: int = VOCAB) -> Path:
    """With a manifest and a table of bytes where it is of a tokenizer."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(stem, 1024) as writer:
        for document in documents or ([1, 2, 3],):
            writer.add(document)
    if tokenizer:
        facts = {"file": f"{tokenizer}.model", "checksum": tokenizer, "vocab_size": ids, "eod_id": 1, "eod_token": "e"}
        manifest_path(stem).write_text(json.dumps({"format": 3, "tokenizer": facts}))
        np.save(token_bytes_path(stem), np.ones(ids, np.int32))
    return stem


def changes(folder: Path, data: str, **protocol: Any) -> dict[str, Any]:
    overrides = {"data": {"train": str(folder / "train"), "validation": ""}, "model.vocab_size": VOCAB, "eval.every": 0}
    return {"overrides": overrides, "evaluation": {"data": str(folder / data), **protocol}}


def runs_on(folder: Path, data: str, **protocol: Any) -> list[PlannedRun]:
    return planned(folder, **changes(folder, data, **protocol))


@pytest.mark.parametrize("documents", [False, True])
def test_data_that_can_be_evaluated_passes(tmp_path: Path, documents: bool) -> None:
    data_set(tmp_path / "train", tokenizer="a")
    data_set(tmp_path / "test", tokenizer="a")
    data_set(tmp_path / "bare")
    check_evaluation_data(runs_on(tmp_path, "test", documents=documents))
    check_evaluation_data(runs_on(tmp_path, "bare", documents=documents))


def test_what_is_not_there_is_said_with_the_command_that_makes_it(tmp_path: Path) -> None:
    data_set(tmp_path / "train", tokenizer="a")
    with pytest.raises(ValueError) as error:
        check_evaluation_data(runs_on(tmp_path, "c4"))
    text = str(error.value)
    assert f"evaluation.data = {tmp_path / 'c4'}: there is no data set" in text
    assert f"moe-train prepare TEXT --output {tmp_path / 'c4'} --tokenizer" in text and "a.model" in text


def test_what_is_damaged_or_too_small_is_refused(tmp_path: Path) -> None:
    data_set(tmp_path / "train")
    data_set(tmp_path / "cut", [1, 2, 3, 4])
    (tmp_path / "cut.bin").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match=r"evaluation\.data = .*cut: .*damaged or truncated"):
        check_evaluation_data(runs_on(tmp_path, "cut"))
    data_set(tmp_path / "short", [1], [2])
    check_evaluation_data(runs_on(tmp_path, "short"))
    with pytest.raises(ValueError, match="no document of .*short has the 2 tokens"):
        check_evaluation_data(runs_on(tmp_path, "short", documents=True))
    (tmp_path / "short.bin").unlink()
    with pytest.raises(ValueError, match=r"short.bin does not exist"):
        check_evaluation_data(runs_on(tmp_path, "short"))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    data_set(tmp_path / "train", tokenizer="a")
    data_set(tmp_path / "test", tokenizer="b")
    with pytest.raises(ValueError, match=r"evaluation\.data = .*test, .*written by different tokenizers"):
        check_evaluation_data(runs_on(tmp_path, "test"))


def test_more_ids_than_the_model_has_are_refused(tmp_path: Path) -> None:
    """By the tokenizer's table where there is one, else by the tokens themselves."""
    data_set(tmp_path / "train")
    data_set(tmp_path / "test", tokenizer="a", ids=VOCAB + 1)
    with pytest.raises(ValueError, match="has 257 ids, more than the model's vocabulary"):
        check_evaluation_data(runs_on(tmp_path, "test"))
    data_set(tmp_path / "bare", [1, 2], [3, VOCAB])
    with pytest.raises(ValueError, match="holds token 256, more than model.vocab_size = 256"):
        check_evaluation_data(runs_on(tmp_path, "bare"))


def test_documents_of_several_data_sets_are_refused(tmp_path: Path) -> None:
    data_set(tmp_path / "train")
    many = [str(data_set(tmp_path / name)) for name in ("a", "b")]
    content = changes(tmp_path, "", documents=True)
    content["evaluation"]["data"] = ""
    content["overrides"]["data"]["validation"] = many
    with pytest.raises(ValueError, match="one at a time"):
        check_evaluation_data(planned(tmp_path, **content))
    content["evaluation"]["documents"] = False
    check_evaluation_data(planned(tmp_path, **content))


def test_missing_data_of_training_and_evaluation_are_said_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        check_all_data(runs_on(tmp_path, "c4"))
    first, second = str(error.value).splitlines()
    assert first.startswith("data.train = ") and second.startswith("evaluation.data = ")


def test_nothing_is_started_without_the_data(tmp_path: Path, quick: None) -> None:
    data_set(tmp_path / "train")
    path = str(write(tmp_path / "two.yaml", **changes(tmp_path, "c4")))
    comparison = prepare(Request(experiment=path, out=tmp_path / "out"))
    runner = FakeRunner()
    with pytest.raises(ValueError, match="there is no data set"):
        compare(comparison, runner, "line", lambda text: None)
    assert runner.trained == [] and not (tmp_path / "out").exists()
    data_set(tmp_path / "c4")
    assert compare(comparison, runner, "line", lambda text: None) == 0
    assert len(runner.trained) == 4
    (tmp_path / "c4.bin").unlink()
    assert compare(comparison, runner, "line", lambda text: None) == 0, "what is finished needs no data"
