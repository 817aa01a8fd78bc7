"""Options of the training data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataOptions:
    train: str = ""
    """Prefix of the training set: <prefix>.bin and <prefix>.idx exist."""
    validation: str = ""
    """Prefix of the validation set; empty for none."""
    sequence_length: int = 256
    """Tokens per sample that the model reads; a sample holds one more, the last target."""
    shuffle: bool = True
    """Visit the samples of an epoch in a seeded permutation."""
