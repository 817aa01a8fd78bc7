"""Megabytes of text per CPU-second of ``moe-train prepare`` against the engine alone and against slower engines.

    python benchmarks/prepare.py --text FOLDER --tokenizer FOLDER/tokenizer.json [--megabytes 500] [--rounds 3]

``--text``: parquet with a column ``text`` (some MB of real text), from whose sentences the corpora are made
(prepare_corpus.py). Arms run one after the other in processes of their own, each round in another order; CPU time
counts from behind the start-up (imports, tokenizer, self-check), which is shown apart. Arms:

- everything: filters, sampling, a split in three, shards, provenance, checksums, restartable parts
- defaults: the command without options: provenance, checksums, restartable parts
- ceiling: pyarrow -> gigatoken -> .bin/.idx, row group by row group, and nothing else
- tiktoken, tokenizers: as the ceiling with these engines, on a few MB

The tokenizer is GPT-2's. Outputs of all arms are compared (number of tokens).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
from prepare_corpus import new_word_share, write_corpus
from rich.console import Console
from rich.table import Table

FAST, SLOW = ("everything", "defaults", "ceiling"), ("tiktoken", "tokenizers")
_SLOW_BYTES = 10_000_000
_SMALL_BYTES = 20_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder for the corpora (default: a temporary one)")
    arguments = parser.parse_args()
    texts = [text for path in sorted(arguments.text.glob("*.parquet")) for text in _texts(path)]
    random.Random(0).shuffle(texts)
    print(
        f"source text: {sum(map(len, texts)) / 1e6:.1f} MB, {new_word_share(texts):.1%} of the words of its second half"
    )
    print("do not occur in its first; the unique corpus has 1 % new words")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for name, unique in (("unique", True), ("repeated", False)):
            folder = Path(scratch) / name
            write_corpus(folder / "large", "\n".join(texts), arguments.megabytes * 1_000_000, unique)
            write_corpus(folder / "small", "\n".join(texts), _SMALL_BYTES, unique, seed=1)
            _report(name, *_measure(folder, arguments.tokenizer, arguments.rounds))
            shutil.rmtree(folder)


def _texts(path: Path) -> list[str]:
    return [text for text in pq.read_table(path, columns=["text"]).column("text").to_pylist() if text]


def _measure(folder: Path, tokenizer: Path, rounds: int) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Results of each arm on the large corpus, one per round, and of one run on the small one."""
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in (*FAST, *SLOW)}
    for turn in range(rounds):
        for place in range(len(FAST)):
            arm = FAST[(turn + place) % len(FAST)]
            found[arm].append(_run(arm, folder / "large", tokenizer, folder / "out"))
        for arm in SLOW:
            found[arm].append(_run(arm, folder / "large", tokenizer, folder / "out", _SLOW_BYTES))
    assert len({one["tokens"] for arm in FAST for one in found[arm]}) == 1, "the arms disagree"
    return found, {arm: _run(arm, folder / "small", tokenizer, folder / "out") for arm in FAST}


def _run(arm: str, sources: Path, tokenizer: Path, output: Path, max_bytes: int | None = None) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("prepare_arms.py")), arm, sources, tokenizer, output]
    command += ["--max-bytes", str(max_bytes)] if max_bytes else []
    one = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=one)
    if result.returncode:
        raise SystemExit(result.stderr)
    facts: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return facts


def _report(name: str, found: dict[str, list[dict[str, Any]]], small: dict[str, Any]) -> None:
    text = found["ceiling"][0]["text_bytes"] / 1e6
    table = Table(title=f"{name} text, {text:.0f} MB, {len(found['ceiling'])} rounds")
    for heading in (
        "arm",
        "MB / CPU-s (rounds)",
        "of ceiling, round by round",
        "start-up CPU-s",
        "peak MB",
        "at 20 MB",
    ):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    speeds = {arm: [one["text_bytes"] / 1e6 / one["cpu_s"] for one in results] for arm, results in found.items()}
    for arm, results in found.items():
        shares = [a / b for a, b in zip(speeds[arm], speeds["ceiling"], strict=True)]
        table.add_row(
            arm,
            f"{median(speeds[arm]):.1f} ({', '.join(f'{speed:.1f}' for speed in speeds[arm])})",
            f"{median(shares):.1%} ({min(shares):.1%} - {max(shares):.1%})",
            f"{median(one['start_up_cpu_s'] for one in results):.1f}",
            f"{max(one['peak_mb'] for one in results):.0f}",
            f"{small[arm]['peak_mb']:.0f}" if arm in small else "-",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
