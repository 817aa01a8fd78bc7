from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from moe_train.data.tokenizers import SentencePieceTokenizer, load_tokenizer, train_sentencepiece

AWKWARD = [
    "\n",
    "\r\n",
    "\t",
    "   ",
    "\u2581",
    "\0",
    "\ufeff",
    "\ufffd",
    "<unk>",
    "<|endoftext|>",
    "<0x41>",
    " \u2047 ",
]
AWKWARD += ["a", "def", "é", "e\u0301", "\ufb01", "\u3000", "\u200b", "日本", "👩\u200d🔬"]


def random_text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randrange(50)):
        point = rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0xE000, 0x110000)])
        parts.append(rng.choice([*AWKWARD, chr(point)]))
    return "".join(parts)


def test_any_text_comes_back_and_its_bytes_add_up(tokenizer: SentencePieceTokenizer) -> None:
    rng = random.Random(1)
    texts = ["", *AWKWARD, *(random_text(rng) for _ in range(2000))]
    sizes = tokenizer.token_bytes()
    assert sizes.dtype == np.int32 and sizes.shape == (tokenizer.vocab_size,)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
        assert tokenizer.eod_id not in ids
    assert sizes[tokenizer.eod_id] == 0


def test_texts_are_encoded_apart_from_each_other(tokenizer: SentencePieceTokenizer) -> None:
    rng = random.Random(2)
    texts = [random_text(rng) for _ in range(50)]
    together = tokenizer.encode_batch(texts)
    assert all(
        np.array_equal(ids, tokenizer.encode_batch([text])[0]) for ids, text in zip(together, texts, strict=True)
    )


def test_pieces_span_newlines_and_spaces(tokenizer: SentencePieceTokenizer) -> None:
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    assert any("\n" in piece and len(piece) > 1 for piece in pieces)
    assert any(set(piece) == {" "} and len(piece) > 1 for piece in pieces)
    assert len(tokenizer.encode_batch(["the router sends"])[0]) < len("the router sends") / 2


def test_part_of_a_character(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode_batch(["日"])[0]
    assert len(ids) == 3 and tokenizer.decode(ids[:1]) == "\ufffd"


def test_training_is_deterministic(tmp_path: Path, make_texts) -> None:
    texts = make_texts(3, 30)
    models = [train_sentencepiece(iter(texts), tmp_path / name, 310) for name in ("a.model", "b.model")]
    assert models[0].checksum == models[1].checksum
    assert (models[0].vocab_size, models[0].eod_id) == (310, 1)
    assert load_tokenizer(tmp_path / "a.model").checksum == models[0].checksum


def test_long_lines_are_trained_on_too(tmp_path: Path) -> None:
    model = train_sentencepiece(["expert " * 5000], tmp_path / "m.model", 270)
    assert "expert" in [model.piece(token).strip() for token in range(258, 270)]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="could not train 5000 pieces.*value <= "):
        train_sentencepiece(["too little text"], tmp_path / "m.model", 5000)
    with pytest.raises(ValueError, match="too small"):
        train_sentencepiece(["text"], tmp_path / "m.model", 100)
    with pytest.raises(ValueError, match="could not train"):
        train_sentencepiece([], tmp_path / "m.model", 400)
    with pytest.raises(FileNotFoundError, match="no.model does not exist"):
        load_tokenizer(tmp_path / "no.model")
    (tmp_path / "bad.model").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="bad.model is not a sentencepiece model"):
        load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(ValueError, match="no known kind of tokenizer"):
        load_tokenizer(tmp_path / "other.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.model", "other.txt"]
