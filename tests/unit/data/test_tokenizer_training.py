"""Options of training a sentencepiece model, and measuring a tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from moe_train.data.sources import find_sources, sample_texts
from moe_train.data.tokenizers import SentencePieceTokenizer, load_tokenizer, train_sentencepiece
from moe_train.data.tokenizers.fertility import measure
from tests.unit.data.test_tokenizers import AWKWARD, random_text

SPECIAL = ["<|im_start|>", "<|im_end|>", "[pad]", "a,b"]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_special_tokens_are_never_the_encoding_of_text(tmp_path: Path, make_texts, model_type) -> None:
    """Also where the training text spells them."""
    texts = [text + " ".join(SPECIAL) for text in make_texts(41, 60)]
    model = train_sentencepiece(texts, tmp_path / "m.model", 325, model_type=model_type, special_tokens=SPECIAL)
    assert model.special_tokens == {"<unk>": 0, "<|endoftext|>": 1} | {s: i for i, s in enumerate(SPECIAL, start=2)}
    again = load_tokenizer(tmp_path / "m.model")
    assert (again.vocab_size, again.eod_id, again.special_tokens) == (325, 1, model.special_tokens)
    rng, special = random.Random(42), set(model.special_tokens.values())
    sizes = model.token_bytes()
    for text in ["", *AWKWARD, *SPECIAL, "".join(SPECIAL), *texts[:5], *(random_text(rng) for _ in range(300))]:
        ids = model.encode_batch([text])[0]
        assert model.decode(ids) == text and sizes[ids].sum() == len(text.encode())
        assert not special & set(ids.tolist())


def test_kinds_of_model_differ_and_each_is_deterministic(tmp_path: Path, make_texts) -> None:
    texts = make_texts(43, 60)
    checksums = {
        kind: {train_sentencepiece(texts, tmp_path / "m.model", 330, model_type=kind).checksum for _ in range(2)}
        for kind in ("bpe", "unigram")
    }
    assert all(len(found) == 1 for found in checksums.values())
    assert checksums["bpe"] != checksums["unigram"]


def test_rare_characters_are_spelled_in_bytes(tmp_path: Path) -> None:
    texts = ["the gate of the expert " * 40 + "ß"] * 20
    lengths = [
        len(train_sentencepiece(texts, tmp_path / "m.model", 290, character_coverage=share).encode_batch(["ß"])[0])
        for share in (1.0, 0.99)
    ]
    assert lengths == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"special_tokens": ["a b"]}, "without white space, not 'a b'"),
        ({"special_tokens": ["\udcff"]}, "a special token is not valid Unicode"),
        ({"special_tokens": [""]}, "without white space, not ''"),
        ({"special_tokens": ["<x>", "<x>"]}, "<x> is there already"),
        ({"special_tokens": ["<|endoftext|>"]}, "is there already"),
        ({"special_tokens": ["<0x41>"]}, "is there already"),
        ({"special_tokens": [f"<{i}>" for i in range(60)]}, "256 bytes, 62 special tokens"),
        ({"character_coverage": 0.5}, "could not train.*character_coverage"),
    ],
)
def test_bad_options(tmp_path: Path, make_texts, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        train_sentencepiece(make_texts(44, 30), tmp_path / "m.model", 310, **options)
    assert list(tmp_path.iterdir()) == []


def test_the_seed_chooses_the_sample(tmp_path: Path, make_texts, write_parquet) -> None:
    texts = make_texts(45, 200)
    files = find_sources([write_parquet(tmp_path / "a.parquet", texts)])
    size = sum(len(text.encode()) for text in texts)
    samples = [list(sample_texts(files, "text", size // 10, seed)) for seed in range(6)]
    assert samples[0] == list(sample_texts(files, "text", size // 10, 0))
    assert len({tuple(sample) for sample in samples}) > 3
    for sample in samples:
        places = [texts.index(text) for text in sample]
        assert places == sorted(places) and len(sample) > 5
        assert max(np.diff(places)) - min(np.diff(places)) <= 1  # spread evenly
    for seed in range(6):
        assert list(sample_texts(files, "text", 10 * size, seed)) == texts


def test_fertility_counts(tokenizer: SentencePieceTokenizer, make_texts) -> None:
    texts = make_texts(46, 600)
    found = measure(tokenizer, iter([*texts, ""]))
    ids = np.concatenate(tokenizer.encode_batch(texts))
    assert (found.documents, found.tokens) == (600, len(ids))
    assert found.words == sum(len(text.split()) for text in texts)
    assert found.text_bytes == len("".join(texts).encode()) == tokenizer.token_bytes()[ids].sum()
    assert found.different_tokens == len(np.unique(ids))
    assert found.tokens_per_document == len(ids) / 600 and found.bytes_per_token == found.text_bytes / len(ids)
    assert found.tokens_per_word == len(ids) / found.words
    with pytest.raises(ValueError, match="no text to measure"):
        measure(tokenizer, ["", ""])
