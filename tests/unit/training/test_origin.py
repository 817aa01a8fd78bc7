"""What a run keeps of the model that it begins with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.data.files import sha256_of
from moe_train.data.manifest import manifest_path
from moe_train.data.options import DataOptions
from moe_train.training.origin import carry_origin, forget_origin

CONFIG = {"model_type": "qwen3", "bos_token_id": 1, "eos_token_id": [2, 3], "max_position_embeddings": 32768}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """In the folder of an imported model."""
    return model(tmp_path / "model")


def model(folder: Path) -> Path:
    (folder / "hf").mkdir(parents=True)
    (folder / "tokenizer.json").write_text(folder.name)
    (folder / "chat_template.jinja").write_text("{{ x }}")
    contents = {"config.json": CONFIG, "generation_config.json": {"eos_token_id": [2, 3]}, "import.json": {}}
    for name, content in contents.items():
        (folder / "hf" / name).write_text(json.dumps(content))
    (folder / "hf" / "LICENSE").write_text("free")
    directory = folder / "checkpoints" / "step_00000000"
    directory.mkdir(parents=True)
    return directory


def prepared(prefix: Path, checksum: str) -> DataOptions:
    tokenizer = {"file": "a", "checksum": checksum, "vocab_size": 9, "eod_id": 1, "eod_token": "<s>"}
    manifest_path(prefix).write_text(json.dumps({"tokenizer": tokenizer}))
    return DataOptions(train=str(prefix))


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


WHOLE = {"tokenizer.json", "chat_template.jinja"} | {
    f"hf/{name}" for name in ("config.json", "generation_config.json", "LICENSE", "origin.json")
}


@pytest.mark.parametrize("recorded", [True, False])
def test_all_but_the_record_of_the_import(tmp_path: Path, checkpoint: Path, recorded: bool) -> None:
    """With data of the same tokenizer, or of none that is known."""
    run = tmp_path / "run"
    run.mkdir()
    own = sha256_of(tmp_path / "model" / "tokenizer.json")
    data = prepared(tmp_path / "train", own) if recorded else DataOptions(train=str(tmp_path / "train"))
    assert carry_origin(run, checkpoint, data) is None
    assert files(run) == WHOLE
    for name in WHOLE - {"hf/origin.json"}:
        assert (run / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_another_tokenizer_of_the_data_wins(tmp_path: Path, checkpoint: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    note = carry_origin(run, checkpoint, prepared(tmp_path / "train", "another"))
    assert note is not None and "another tokenizer" in note and str(tmp_path / "model") in note
    assert files(run) == {"hf/config.json", "hf/LICENSE", "hf/origin.json"}
    assert json.loads((run / "hf" / "config.json").read_text()) == {
        "model_type": "qwen3",
        "max_position_embeddings": 32768,
    }


def test_what_is_there_stays(tmp_path: Path, checkpoint: Path) -> None:
    """When the run is started again before it has saved anything; also a tokenizer that somebody put there."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "tokenizer.model").write_text("mine")
    carry_origin(run, checkpoint, DataOptions())
    assert files(run) == {name for name in WHOLE if name.startswith("hf/")} | {"tokenizer.model"}
    (run / "hf" / "LICENSE").write_text("changed")
    carry_origin(run, checkpoint, DataOptions())
    assert (run / "hf" / "LICENSE").read_text() == "changed"
    forget_origin(run)
    assert files(run) == {"tokenizer.model"}


def test_another_beginning_leaves_nothing_of_the_first(tmp_path: Path, checkpoint: Path) -> None:
    run, second = tmp_path / "run", model(tmp_path / "second")
    run.mkdir()
    (tmp_path / "model" / "hf" / "NOTICE").write_text("x")
    carry_origin(run, checkpoint, DataOptions())
    assert "hf/NOTICE" in files(run)
    carry_origin(run, second, DataOptions())
    assert files(run) == WHOLE and (run / "tokenizer.json").read_text() == "second"
    forget_origin(run)
    assert not files(run) and not (run / "hf").exists()


def test_a_run_passes_it_on(tmp_path: Path, checkpoint: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for run, begun in ((first, checkpoint), (second, first / "checkpoints" / "step_00000003")):
        run.mkdir()
        carry_origin(run, begun, DataOptions())
    assert files(second) == WHOLE


def test_what_came_with_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    carry_origin(run, tmp_path / "other" / "checkpoints" / "step_00000003", DataOptions())
    forget_origin(run)
    assert not files(run)
