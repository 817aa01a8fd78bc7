"""Prompts and ends of texts for runs of our own and for imported models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers

from moe_train.data.files import sha256_of
from moe_train.data.manifest import manifest_path
from moe_train.data.options import DataOptions
from moe_train.model.options import ModelOptions
from moe_train.training.run_config import RunConfig
from moe_train.training.run_tokenizer import NoTokenizer, encode_prompts, end_ids, run_tokenizer

CONFIG = RunConfig(model=ModelOptions(vocab_size=300), data=DataOptions(train="gone/train"))


@pytest.fixture(params=["begins texts", "plain"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run folder with a tokenizer of bytes; whose file may put <s> in front of a text and </s> behind it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.add_special_tokens(["<s>", "</s>"])
    if request.param == "begins texts":
        engine.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return tmp_path


def test_what_stands_in_front_of_a_prompt(folder: Path, request: pytest.FixtureRequest) -> None:
    """Our own training puts nothing there; an imported model gets what its tokenizer's file says."""
    tokenizer = run_tokenizer(folder, CONFIG)
    letters = tokenizer.encode_batch(["a<s>"])[0].tolist()
    assert encode_prompts(tokenizer, folder, ["a<s>", ""]) == [letters, [257]] and len(letters) == 4
    (folder / "hf").mkdir()
    begins = "begins texts" in request.node.name
    want = [[256, *letters], [256]] if begins else [letters, [257]]
    assert encode_prompts(tokenizer, folder, ["a<s>", ""]) == want
    for name in ("metrics.jsonl", "hf/origin.json"):  # trained on from there, or upcycled from what was
        (folder / name).touch()
        assert encode_prompts(tokenizer, folder, ["a<s>", ""]) == [letters, [257]]
        (folder / name).unlink()


def test_documents_end_as_in_the_data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the tokenizer in the run's folder is the one that wrote them."""
    data = tmp_path_factory.mktemp("data") / "train"
    config = replace(CONFIG, data=DataOptions(train=str(data)))
    recorded = {"file": "a.json", "vocab_size": 258, "eod_id": 256, "eod_token": "<s>"}
    for checksum, want in ((sha256_of(folder / "tokenizer.json"), 256), ("another", 257)):
        manifest_path(data).write_text(json.dumps({"tokenizer": recorded | {"checksum": checksum}}))
        assert run_tokenizer(folder, config).eod_id == want


def test_prompts_that_are_no_text(folder: Path) -> None:
    tokenizer = run_tokenizer(folder, CONFIG)
    for text in ("abc\ud800", "\udcff" + "x" * 100):
        with pytest.raises(ValueError, match=r"prompt 1 is not valid Unicode at character [03]: .*\\ud"):
            encode_prompts(tokenizer, folder, ["fine 🙂", text])


def test_ends(folder: Path) -> None:
    tokenizer = run_tokenizer(folder, CONFIG)
    assert end_ids(tokenizer, folder) == {257}
    (folder / "hf").mkdir()
    path = folder / "hf" / "generation_config.json"
    for named, want in ((5, {257, 5}), ([257, 7], {257, 7}), (None, {257})):
        path.write_text(json.dumps({"eos_token_id": named}))
        assert end_ids(tokenizer, folder) == want
    path.write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is damaged"):
        end_ids(tokenizer, folder)


def test_none_is_found(tmp_path: Path) -> None:
    with pytest.raises(NoTokenizer, match="gone/train.manifest.json.*--tokenizer PATH"):
        run_tokenizer(tmp_path, CONFIG)
