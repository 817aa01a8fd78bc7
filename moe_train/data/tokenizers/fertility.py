"""How many tokens a tokenizer makes of a kind of text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moe_train.data.tokenizers.interface import Tokenizer

_BATCH = 256


@dataclass(frozen=True)
class Fertility:
    """Sums over texts; tokens without those that end documents."""

    documents: int
    words: int
    """What white space separates."""
    text_bytes: int
    """In UTF-8."""
    tokens: int
    different_tokens: int
    """Of the vocabulary, how many occur."""

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / self.tokens

    @property
    def tokens_per_word(self) -> float:
        return self.tokens / self.words if self.words else float("nan")

    @property
    def tokens_per_document(self) -> float:
        return self.tokens / self.documents


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> Fertility:
    """Encodes the texts, a bounded number at a time; empty ones do not count as documents.

    Errors: ValueError where there is no text.
    """
    stream = iter(text for text in texts if text)
    documents = words = text_bytes = tokens = 0
    occurs_V = np.zeros(tokenizer.vocab_size, bool)
    while batch := list(itertools.islice(stream, _BATCH)):
        documents += len(batch)
        words += sum(len(text.split()) for text in batch)
        text_bytes += sum(len(text.encode()) for text in batch)
        for ids in tokenizer.encode_batch(batch):
            tokens += len(ids)
            occurs_V[ids] = True
    if not documents:
        raise ValueError("the sources hold no text to measure the tokenizer on")
    return Fertility(documents, words, text_bytes, tokens, int(occurs_V.sum()))
