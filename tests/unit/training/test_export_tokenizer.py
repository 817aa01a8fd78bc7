"""transformers' AutoTokenizer gives the ids of training for what stands beside an export."""

from __future__ import annotations

import io
import json
import random
import secrets
from pathlib import Path
from typing import Any

import pytest

from moe_train.data.files import sha256_of
from moe_train.data.manifest import manifest_path
from moe_train.data.options import DataOptions
from moe_train.data.tokenizers import SentencePieceTokenizer, train_sentencepiece
from moe_train.interop.keys import FAMILY_OF_TYPE
from moe_train.training.export_tokenizer import carry_tokenizer
from moe_train.training.run_config import RunConfig

VOCAB = 340
OTHERS = ["", " a", "a ", "  ", "\n\n x", "\U0001f937 zz\0  \t"]
_ALPHABET = "abcdefgh \n\t\u00e9\u65e5\U0001f600\ufb011"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    seed = secrets.randbits(31)
    print(f"seed {seed}")
    chance = random.Random(seed)
    words = ["".join(chance.choices(_ALPHABET, k=chance.randint(1, 6))) for _ in range(200)]
    return [" ".join(chance.choices(words, k=50)) + "\n" for _ in range(200)]


def with_prefix(texts: list[str], path: Path) -> SentencePieceTokenizer:
    """As Llama 2 has it: a space in front of each text."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


def carried(folder: Path, file: str, eod: tuple[int, str], kind: str) -> tuple[dict[str, Any], list[str]]:
    """In folder/out, for data whose tokenizer is that file of the folder."""
    checksum = sha256_of(folder / file)
    recorded = {"file": file, "checksum": checksum, "vocab_size": VOCAB, "eod_id": eod[0], "eod_token": eod[1]}
    manifest_path(folder / "train").write_text(json.dumps({"tokenizer": recorded}))
    (folder / "run").mkdir()
    (folder / "out").mkdir()
    (folder / "out" / "config.json").write_text(json.dumps({"model_type": kind}))
    return carry_tokenizer(folder / "run", RunConfig(data=DataOptions(train=str(folder / "train"))), folder / "out")


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", FAMILY_OF_TYPE)
def test_pairs_of_bytes(tmp_path: Path, texts: list[str], kind: str) -> None:
    path = tmp_path / "words.model"
    ours = train_sentencepiece(texts, path, VOCAB, special_tokens=["<|user|>"])
    said, notes = carried(tmp_path, path.name, (ours.eod_id, ours.piece(ours.eod_id)), kind)
    assert said == {"eos_token_id": ours.eod_id} and not notes
    theirs = load(tmp_path / "out")
    assert (len(theirs), theirs.eos_token_id) == (VOCAB, ours.eod_id)
    for text in [*texts[:50], *OTHERS]:
        ids = ours.encode_batch([text])[0].tolist()
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
    assert theirs("a<|user|>")["input_ids"][-1] == ours.special_tokens["<|user|>"]


def test_a_unigram_model(tmp_path: Path, texts: list[str]) -> None:
    """The same ids, but where two ways to cut a word have the same score."""
    import sentencepiece

    path = tmp_path / "words.model"
    ours = train_sentencepiece(texts, path, VOCAB, model_type="unigram")
    score = sentencepiece.SentencePieceProcessor(model_file=str(path)).get_score
    _, notes = carried(tmp_path, path.name, (ours.eod_id, ours.piece(ours.eod_id)), "qwen3_moe")
    assert len(notes) == 1 and "words.model is a unigram model" in notes[0]
    theirs = load(tmp_path / "out")
    for text in [*texts[:50], *OTHERS]:
        want, got = ours.encode_batch([text])[0].tolist(), theirs(text)["input_ids"]
        assert want == got or abs(sum(map(score, want)) - sum(map(score, got))) < 1e-2
        assert theirs.decode(want) == theirs.decode(got) == text


def test_a_sentencepiece_model_that_normalises(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "words.model"
    ours = with_prefix(texts, path)
    _, notes = carried(tmp_path, path.name, (ours.eod_id, ours.piece(ours.eod_id)), "qwen3_moe")
    assert len(notes) == 1 and "words.model normalises texts" in notes[0]
    theirs = load(tmp_path / "out")
    assert (len(theirs), theirs.eos_token_id) == (VOCAB, ours.eod_id)
    for text in [*texts[:50], *OTHERS]:
        assert theirs(text)["input_ids"] == ours.encode_batch([text])[0].tolist()


def test_ranks_of_tiktoken(tmp_path: Path) -> None:
    (tmp_path / "ranks.tiktoken").write_text("YQ== 0\nYg== 1\n")
    _, notes = carried(tmp_path, "ranks.tiktoken", (2, "<|endoftext|>"), "qwen3_moe")
    assert len(notes) == 1 and "ranks.tiktoken is copied as it is" in notes[0]


def test_a_damaged_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "words.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="words.model of the run's data is damaged"):
        carried(tmp_path, "words.model", (2, "</s>"), "qwen3_moe")
