"""Nothing that is in the folder of a model runs when it is imported."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.cli import main
from tests.reference import hub
from tests.reference.malicious import payload


def only_pickles(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payload(canary))


def pickle_beside(folder: Path, canary: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", "optimizer.pt"):
        (folder / name).write_bytes(payload(canary))


def pickle_under_the_other_name(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").write_bytes(payload(canary))


def pickle_as_the_header(folder: Path, canary: Path) -> None:
    content = payload(canary)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)


def code_of_its_own(folder: Path, canary: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_x.py", "modeling_x.py"):
        (folder / name).write_text(f"import os\nos.mkdir({str(canary)!r})\n")


def code_of_its_own_for_the_tokenizer(folder: Path, canary: Path) -> None:
    settings = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_x.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")


REFUSED = [only_pickles, pickle_under_the_other_name, pickle_as_the_header, code_of_its_own]
LEFT_ALONE = [pickle_beside, code_of_its_own_for_the_tokenizer]


@pytest.mark.parametrize("spoil", [*REFUSED, *LEFT_ALONE])
def test_it_is_refused_or_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path, Path], None]
) -> None:
    folder, canary = tmp_path / "hub", tmp_path / "canary"
    hub.make(folder, hub.MODELS["qwen3_moe"], 1)
    spoil(folder, canary)
    code = main(["convert", "import", str(folder), str(tmp_path / "ours")])
    assert code == (2 if spoil in REFUSED else 0), capsys.readouterr().err
    assert not canary.exists()


def test_the_payload_does_run(tmp_path: Path) -> None:
    pickle.loads(payload(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()
