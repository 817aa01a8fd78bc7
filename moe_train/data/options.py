"""Options of the training data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class BlendMember:
    """A data set of a blend with its share of the samples."""

    __pydantic_config__ = {"extra": "forbid"}

    path: str
    """Name of the data set."""
    weight: float
    """Share of the samples relative to the other weights; greater than 0."""


Blend = str | list[str | BlendMember]
"""One data set by name, several by name (shares by their sizes), or several with weights."""


@dataclass(frozen=True)
class Stage:
    """From a step on the samples come from another blend."""

    __pydantic_config__ = {"extra": "forbid"}

    from_step: int
    """The first optimizer step (counted from 0, so after so many steps) that reads this blend."""
    train: Blend


@dataclass(frozen=True)
class DataOptions:
    train: Blend = ""
    """Training data: a name (docs/data.md), a list of names, or a list of {path, weight}."""
    validation: Blend = ""
    """Validation data, likewise; empty for none."""
    stages: list[Stage] = field(default_factory=list)
    """Blends that replace data.train from a step on, in the order of their steps."""
    sequence_length: int = 256
    """Tokens per sample that the model reads; a sample holds one more, the last target."""
    shuffle: bool = True
    """Visit the samples of an epoch in a seeded permutation."""
    sampler: Literal["packed", "documents"] = "packed"
    """packed: windows of the joined documents; documents: each sequence begins with a document and is padded."""
    reset_at_documents: bool = False
    """With packed: attention, positions and targets do not cross the boundary of a document."""
    pack_documents: bool = False
    """With documents: as many whole documents as fit into a sequence, which do not see each other."""
    index_cache: str = ""
    """With documents: folder for the index of samples, written once per node; empty for <run>/index."""


def members_of(blend: Blend) -> list[tuple[str, float | None]]:
    """Name and weight of each member; None where the weight follows from the size."""
    if isinstance(blend, str):
        return [(blend, None)] if blend else []
    return [(entry, None) if isinstance(entry, str) else (entry.path, entry.weight) for entry in blend]


def names_of(blend: Blend) -> list[str]:
    return [name for name, _ in members_of(blend)]


def label_of(blend: Any) -> str:
    """One line for a blend, also where it is plain values of a config.yaml."""
    if not isinstance(blend, list):
        return str(blend or "")
    entries = [entry.get("path") if isinstance(entry, dict) else getattr(entry, "path", entry) for entry in blend]
    return " + ".join(map(str, entries))


def all_names(options: DataOptions) -> list[str]:
    """Every training set of all stages, each once, in the order in which they are first named."""
    blends = [options.train, *(stage.train for stage in options.stages)]
    return list(dict.fromkeys(name for blend in blends for name, _ in members_of(blend)))
