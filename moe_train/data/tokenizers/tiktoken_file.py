"""tiktoken's rank files: lines of `base64-of-bytes rank`, as OpenAI's `*.tiktoken` and Llama 3's `tokenizer.model`.

A rank file does not say how text is cut before merging, nor which special tokens there are; both are published with the
code of each encoding and stand in the table below. Sources: openai/tiktoken (r50k_base, cl100k_base, o200k_base),
meta-llama/llama3 (tokenizer.py), Qwen (tokenization_qwen.py).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.data.files import sha256_of
from moe_train.data.tokenizers.interface import IdArray, Tokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _digits(count: str) -> str:
    """The pattern of cl100k with runs of so many digits."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{count}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


@dataclass(frozen=True)
class Encoding:
    """What a rank file leaves out."""

    pattern: str
    special: dict[str, int]
    eod: str
    scheme: str
    """gigatoken's name of the pattern."""


_GPT2 = Encoding(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    {"<|endoftext|>": 50256},
    "<|endoftext|>",
    "r50k",
)
_LLAMA_3_NAMED = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}


def _llama_3() -> dict[str, int]:
    """256 tokens behind the ranks; those without a name of their own are numbered."""
    names, reserved = [], 0
    for index in range(256):
        if index in _LLAMA_3_NAMED:
            names.append(f"<|{_LLAMA_3_NAMED[index]}|>")
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return {name: 128000 + index for index, name in enumerate(names)}


ENCODINGS = {
    "gpt2": _GPT2,
    "r50k_base": _GPT2,
    "cl100k_base": Encoding(
        _digits("{1,3}"),
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        "<|endoftext|>",
        "cl100k",
    ),
    "o200k_base": Encoding(
        "|".join(
            [
                rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?",
                rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}?",
                r"\p{N}{1,3}",
                r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
                _SPACES,
            ]
        ),
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
        "<|endoftext|>",
        "o200k",
    ),
    "llama3": Encoding(_digits("{1,3}"), _llama_3(), "<|end_of_text|>", "cl100k"),
    "qwen": Encoding(
        _digits(""),
        {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
        "<|endoftext|>",
        "qwen2",
    ),
}
_BY_RANKS = {50256: "r50k_base", 100256: "cl100k_base", 199998: "o200k_base", 128000: "llama3", 151643: "qwen"}
"""Ranks in the published file -> encoding, for files of another name."""


class TiktokenTokenizer(Tokenizer):
    """A rank file of a known encoding, recognised by its name or by how many ranks it has.

    Errors: FileNotFoundError; ImportError that names the extra; ValueError for a damaged file or an unknown encoding.
    """

    def __init__(self, path: str | Path, eod_token: str | None = None, encoding: str | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"tokenizer {self.path} does not exist")
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError(f"{self.path} needs the package tiktoken: pip install 'moe-train[data]'") from error
        ranks = read_ranks(self.path)
        name = encoding or (self.path.stem if self.path.stem in ENCODINGS else _BY_RANKS.get(len(ranks)))
        if name not in ENCODINGS:
            raise ValueError(
                f"{self.path} has {len(ranks)} ranks, of no encoding that is known by name or size, and a rank file "
                f"does not say how text is cut; known are {', '.join(ENCODINGS)}"
            )
        self.encoding_name, self.encoding = name, ENCODINGS[name]
        eod = eod_token or self.encoding.eod
        if eod not in self.encoding.special:
            raise ValueError(f"{name} has no special token {eod!r}; it has {', '.join(self.encoding.special)}")
        self.special_tokens = dict(self.encoding.special)
        self.eod_id = self.encoding.special[eod]
        self._engine: Any = tiktoken.Encoding(
            name, pat_str=self.encoding.pattern, mergeable_ranks=ranks, special_tokens=self.encoding.special
        )
        self.checksum = sha256_of(self.path)
        self.bytes_V = [b""] * (1 + max(*ranks.values(), *self.encoding.special.values()))
        for content, token in ranks.items():
            self.bytes_V[token] = content

    @property
    def copy_name(self) -> str:
        return f"{self.encoding_name}.tiktoken"

    def encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        threads = self.threads or os.cpu_count() or 1
        encoded = self._engine.encode_ordinary_batch(list(texts), num_threads=threads)
        return [np.array(ids, np.int32) for ids in encoded]


def is_rank_file(path: Path) -> bool:
    """Whether a file begins like a rank file; its name may say anything."""
    with open(path, "rb") as stream:
        first = stream.readline(4096).split()
    try:
        return len(first) == 2 and first[1].isdigit() and bool(base64.b64decode(first[0], validate=True))
    except ValueError:
        return False


def read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes -> rank. ValueError that names the line of a damaged file."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            content, rank = line.split()
            ranks[base64.b64decode(content, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not `base64 rank`: {line[:60]!r}") from error
    return ranks
