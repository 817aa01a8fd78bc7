"""Whole runs through the command line, on small made-up data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_train.data.indexed import IndexedWriter

VOCAB = 256


def write_tokens(prefix: Path, tokens: int, seed: int, vocab: int = VOCAB) -> Path:
    """Documents of a second-order pattern with noise, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, vocab) as writer:
        while writer.token_count < tokens:
            length = int(rng.integers(20, 200))
            document = (np.arange(length) * int(rng.integers(1, 5)) + rng.integers(0, vocab)) % vocab
            noise = rng.random(length) < 0.1
            document[noise] = rng.integers(0, vocab, int(noise.sum()))
            writer.add(document)
    return prefix


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.* and validation.*."""
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(folder / "train", 20_000, seed=1)
    write_tokens(folder / "validation", 3_000, seed=2)
    return folder


def overrides(data: Path, *more: str) -> list[str]:
    """key=value arguments for the tiny experiment on this data."""
    return [
        f"data.train={data / 'train'}",
        f"data.validation={data / 'validation'}",
        "data.sequence_length=32",
        f"model.vocab_size={VOCAB}",
        *more,
    ]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "moe_train", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def moe_train(
    *arguments: object, timeout: float = 600, env: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """Runs the command line to its end; ``env``: variables besides those that every command gets."""
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        command(*arguments),
        capture_output=True,
        text=True,
        env=environment() | (env or {}),
        timeout=timeout,
        **options,
    )
