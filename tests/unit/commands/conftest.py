"""Data that the commands wrote, for tests of several of them."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_train.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.parquet, m.model trained on it, and its tokens in out/, all written by the commands."""
    root = tmp_path_factory.mktemp("data")
    rng = random.Random(1)
    words = "load router token expert gate\n balance\n\n sum".split(" ")
    texts = [f"text {i}: " + " ".join(rng.choices(words, k=40)) for i in range(80)] + [""]
    names = [f"doc-{i}" for i in range(81)]
    pq.write_table(pa.table({"text": texts, "id": names, "url": names, "dump": ["prose"] * 81}), root / "text.parquet")
    assert (
        main(["tokenizer", "train", f"{root}/text.parquet", "--output", f"{root}/m.model", "--vocab-size", "300"]) == 0
    )
    assert main(prepare_arguments(root)) == 0
    return root


def prepare_arguments(root: Path, *more: str) -> list[str]:
    command = ["prepare", f"{root}/text.parquet", "--output", f"{root}/out/", "--tokenizer", f"{root}/m.model"]
    return [*command, "--validation-fraction", "0.05", "--workers", "1", *more]
