from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from moe_train.data.indexed import IndexedWriter
from moe_train.data.tokenizers import SentencePieceTokenizer, train_sentencepiece

WORDS = "the router sends each token to four experts and counts its load\nbefore any is dropped def return self".split(
    " "
)


def english(rng: random.Random, words: int) -> str:
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", ".\n", "):\n    ", "\t"]) for _ in range(words))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    rng = random.Random(5)
    texts = [english(rng, 200) for _ in range(20)]
    return train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer") / "small.model", 320)


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small byte-level BPE as GPT-2 has one."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|other|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(6)
    engine.train_from_iterator([english(rng, 200) + " it's 12345 é 日本語" for _ in range(50)], trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    return folder


@pytest.fixture
def write_parquet() -> Callable[..., Path]:
    """Writes columns as parquet with FineWeb's names: text, and id, url and dump unless they are given."""

    def write(path: Path, texts: list[str | None], row_group_size: int = 7, **columns: list[Any]) -> Path:
        names = [f"{path.stem}-{row}" for row in range(len(texts))]
        given = {"id": names, "url": [f"https://{name}" for name in names], "dump": ["one"] * len(texts)} | columns
        types = {name: pa.string() for name in given}
        table = pa.table(
            {"text": pa.array(texts, pa.string())} | {n: pa.array(v, types[n]) for n, v in given.items() if v}
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=row_group_size)
        return path

    return write


@pytest.fixture
def make_texts() -> Callable[[int, int], list[str]]:
    """So many different texts of a seed."""

    def make(seed: int, count: int) -> list[str]:
        rng = random.Random(seed)
        return [f"{seed}.{i} " + english(rng, rng.randrange(1, 60)) for i in range(count)]

    return make


@pytest.fixture
def write_tokens() -> Callable[..., list[np.ndarray]]:
    """Writes documents of random tokens (or of given lengths) under a stem, in as many shards as asked for."""

    def write(
        stem: Path, lengths: list[int], *, seed: int = 0, vocab: int = 1000, cuts: list[int] | None = None
    ) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        documents = [rng.integers(0, vocab, length) for length in lengths]
        bounds = [0, *(cuts or []), len(documents)]
        for number, (first, stop) in enumerate(pairwise(bounds)):
            prefix = f"{stem}_text_document" if cuts is None else f"{stem}_{number:05d}_text_document"
            with IndexedWriter(prefix, vocab) as writer:
                for document in documents[first:stop]:
                    writer.add(document)
        return documents

    return write
