"""The data of the demonstration: the interpreter's standard library as text, a tokenizer, indexed tokens."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

DATA = Path("data/demo")


def steps(data: Path = DATA) -> list[tuple[str, Path, list[str]]]:
    """What is made, the file that tells that it is there, and the arguments of ``moe-train`` that make it."""
    corpus, tokenizer = data / "corpus", data / "tokenizer.model"
    return [
        ("text", corpus / "stdlib.parquet", ["prepare", "--corpus", "stdlib", "--output", str(corpus)]),
        (
            "tokenizer",
            tokenizer,
            ["tokenizer", "train", str(corpus), "--output", str(tokenizer), "--vocab-size", "8192"],
        ),
        (
            "tokens",
            data / "validation.manifest.json",
            ["prepare", str(corpus), "--output", f"{data}/", "--tokenizer", str(tokenizer)]
            + ["--validation-fraction", "0.05"],
        ),
    ]


def make(say: Callable[[str], None]) -> int:
    """Makes what is missing below the working directory; returns the exit code of the step that failed, or 0."""
    for name, result, arguments in steps():
        if not result.exists():
            say(f"making {name}: moe-train {shlex.join(arguments)}")
            if code := subprocess.run([sys.executable, "-m", "moe_train", *arguments]).returncode:
                return code
    return 0
