"""Tokenizers in the formats that models are published in, and the fast engine against their own engines."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import numpy as np
import pytest

from moe_train.data.tokenizers import SentencePieceTokenizer, Tokenizer, gigatoken_engine, load_tokenizer
from moe_train.data.tokenizers.gigatoken_engine import GigatokenTokenizer, with_fast_engine
from moe_train.data.tokenizers.tiktoken_file import ENCODINGS, TiktokenTokenizer
from tests.unit.data.test_tokenizers import AWKWARD, random_text

WORDS = ["the ", "tree", "'s", " 12345", "  ", "\n\n", "don't ", "é", "日本語", "\t", "x=1;", "\u2581", "<|endoftext|>"]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    plain = ["".join(rng.choice(WORDS) for _ in range(rng.randrange(40))) for _ in range(count)]
    return ["", *AWKWARD, *plain, *(random_text(rng) for _ in range(count))]


@pytest.fixture(scope="module")
def ranks(byte_level: Path) -> Path:
    """A tiktoken file with the bytes and some words, under the name of a known encoding."""
    pieces = [bytes([i]) for i in range(256)]
    pieces += [b"th", b"the", b" the", b"tr", b"ee", b"tree", b"\n\n", b"  ", b"12", b"34", b" 12"]
    pieces += [b"\xe6\x97", b"\xe6\x97\xa5"]
    path = byte_level / "cl100k_base.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(p) + b" %d\n" % rank for rank, p in enumerate(pieces)))
    return path


@pytest.fixture(params=["hugging_face", "tiktoken", "sentencepiece"])
def published(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "hugging_face":
        return load_tokenizer(request.getfixturevalue("byte_level"))
    if request.param == "tiktoken":
        return load_tokenizer(request.getfixturevalue("ranks"))
    model = request.getfixturevalue("tokenizer")
    assert isinstance(model, SentencePieceTokenizer)
    return model


def test_any_text_comes_back_and_its_bytes_add_up(published: Tokenizer) -> None:
    """Also text that spells a special token: it is encoded letter by letter."""
    sizes = published.token_bytes()
    assert sizes.shape == (published.vocab_size,) and sizes[published.eod_id] == 0
    for text, ids in zip(given := texts(200, seed=1), published.encode_batch(given), strict=True):
        assert ids.dtype == np.int32 and published.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
        assert not set(ids.tolist()) & set(published.special_tokens.values())


def test_gigatoken_encodes_alike(published: Tokenizer) -> None:
    said: list[str] = []
    fast = with_fast_engine(published, texts(50, seed=3), said.append)
    assert isinstance(fast, GigatokenTokenizer) and not said
    given = texts(500, seed=4)
    for text, got, want in zip(given, fast.encode_batch(given), published.encode_batch(given), strict=True):
        assert np.array_equal(got, want), text
    assert fast.encode_batch([]) == [] and fast.encode_batch([""])[0].tolist() == []
    assert (fast.eod_id, fast.vocab_size, fast.checksum) == (
        published.eod_id,
        published.vocab_size,
        published.checksum,
    )


def test_ids_tell_who_spells_a_special_token(byte_level: Path, ranks: Path, tmp_path: Path) -> None:
    """Where special tokens have the highest ids, as in GPT-2, Qwen and Llama."""
    facts = json.loads((byte_level / "tokenizer.json").read_text())
    size, special = len(facts["model"]["vocab"]), len(facts["added_tokens"])
    facts["model"]["vocab"] = {piece: (i - special) % size for piece, i in facts["model"]["vocab"].items()}
    for token in facts["added_tokens"]:
        token["id"] = (token["id"] - special) % size
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    original = load_tokenizer(tmp_path, "<|endoftext|>")
    fast = GigatokenTokenizer(original, gigatoken_engine._engine(original))
    assert fast._special_from == min(original.special_tokens.values()) > 0
    spellings = list(original.special_tokens)
    for spelling in spellings:
        for text in (spelling, spelling[:-1] + spelling, f"\u00e9{spelling}1", f"<|{spelling}{spellings[0]} "):
            given = ["before", text, "behind"]
            for got, want in zip(fast.encode_batch(given), original.encode_batch(given), strict=True):
                assert np.array_equal(got, want) and got.max() < fast._special_from
    deaf = load_tokenizer(ranks)  # gigatoken is not told of its special tokens
    assert GigatokenTokenizer(deaf, gigatoken_engine._engine(deaf))._special_from == 0


def test_a_fast_engine_that_differs_is_not_used(published: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    right = GigatokenTokenizer.encode_batch
    monkeypatch.setattr(GigatokenTokenizer, "encode_batch", lambda self, given: [x[:-1] for x in right(self, given)])
    assert with_fast_engine(published, ["some text"], said.append) is published
    assert "differently" in said[0] and "WARNING" in said[0]


def test_a_fast_engine_that_panics_is_not_used(byte_level: Path) -> None:
    """gigatoken 0.10.0 panics at a rank that no two others make; tiktoken reads it."""
    pieces = [*(bytes([i]) for i in range(256)), b"abc"]
    path = byte_level / "o200k_base.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(p) + b" %d\n" % rank for rank, p in enumerate(pieces)))
    said: list[str] = []
    tokenizer = load_tokenizer(path)
    assert with_fast_engine(tokenizer, ["abc"], said.append) is tokenizer
    assert "does not take" in said[0]


def test_the_end_of_a_document_is_found_or_asked_for(byte_level: Path, ranks: Path, tmp_path: Path) -> None:
    assert load_tokenizer(byte_level).piece(load_tokenizer(byte_level).eod_id) == "<|endoftext|>"
    alone = tmp_path / "tokenizer.json"
    alone.write_bytes((byte_level / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=r"--eod-token.*<\|endoftext\|>, <\|other\|>"):
        load_tokenizer(alone)
    assert load_tokenizer(alone, "<|other|>").eod_id == load_tokenizer(byte_level).special_tokens["<|other|>"]
    with pytest.raises(ValueError, match="no special token 'nothing'"):
        load_tokenizer(alone, "nothing")
    assert load_tokenizer(ranks, "<|fim_prefix|>").eod_id == 100258


def test_llama_3_names_its_model_like_sentencepiece(ranks: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(ranks.read_bytes())
    with pytest.raises(ValueError, match="269 ranks, of no encoding that is known"):
        load_tokenizer(tmp_path)
    tokenizer = TiktokenTokenizer(path, encoding="llama3")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (128256, 128001)
    assert len(ENCODINGS["llama3"].special) == 256 and ENCODINGS["llama3"].special["<|eot_id|>"] == 128009


def test_damaged_files_are_named(tmp_path: Path, ranks: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer.json, or it is damaged"):
        load_tokenizer(tmp_path)
    damaged = tmp_path / "r50k_base.tiktoken"
    damaged.write_bytes(ranks.read_bytes() + b"?? x\n")
    with pytest.raises(ValueError, match="line 270"):
        load_tokenizer(damaged)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither"):
        load_tokenizer(tmp_path / "empty")
