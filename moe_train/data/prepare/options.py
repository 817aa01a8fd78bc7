"""What decides the result of a preparation, besides sources and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_train.data.instruction import InstructionOptions

SPLITS = ("train", "validation", "test")
STOPPABLE = ("null", "empty", "too short", "too long")


@dataclass(frozen=True)
class PrepareOptions:
    text_column: str = "text"
    id_column: str = "id"
    """Name of a document in the provenance table."""
    domain_column: str = "dump"
    """Label of a document; empty where a file has no such column."""
    split_column: str = "url"
    """Documents with the same value stay on one side. The id stands in for a missing one, and the text for that."""
    split_from: str = ""
    """Column that names the side itself (train, validation or test), in place of the fractions."""
    validation_fraction: float = 0.0
    """Share of the documents (by hash of the split column) for validation."""
    test_fraction: float = 0.0
    """Likewise for a test set. Without any of these options there is one set and no split."""
    split_seed: int = 0
    """Another seed gives another split."""
    append_eod: bool = True
    """End each document with the tokenizer's end-of-document token."""
    min_language_score: float | None = None
    """Leave out documents whose ``language_score`` is lower, or missing."""
    dumps: tuple[str, ...] = ()
    """Leave out documents whose ``dump`` is none of these."""
    url_include: str = ""
    """Leave out documents whose ``url`` this regular expression (RE2) does not match anywhere."""
    url_exclude: str = ""
    """Leave out documents whose ``url`` it matches."""
    min_chars: int = 0
    max_chars: int | None = None
    """Leave out shorter and longer texts."""
    sample: float = 1.0
    """Share of the documents to keep, chosen by hash of the id (of the text where there is none)."""
    sample_seed: int = 0
    max_documents: int | None = None
    """Take so many documents at most, the first ones in source order, over all splits together."""
    max_tokens: int | None = None
    """Take documents as long as their tokens together are no more than that."""
    shard_tokens: int | None = None
    """Begin another pair of files before a document that would bring the shard above so many tokens."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do about a row that cannot be read: bad JSON, invalid UTF-8, no text, a damaged page. ``skip`` counts it
    and goes on."""
    stop_on: tuple[str, ...] = ()
    """Of null, empty, too short and too long, what is to stop the job too; else they are left out and counted."""
    instruction: InstructionOptions | None = None
    """Rows hold conversations, not texts."""

    def __post_init__(self) -> None:
        """ValueError for values that make no sense."""
        fractions = {"validation fraction": self.validation_fraction, "test fraction": self.test_fraction}
        for name, value in fractions.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {value}")
        if sum(fractions.values()) >= 1:
            raise ValueError(f"validation and test fraction leave nothing to train on: {sum(fractions.values())}")
        if self.split_from and any(fractions.values()):
            raise ValueError("sides come from a column or from fractions, not from both: leave one of them out")
        if not 0 < self.sample <= 1:
            raise ValueError(f"the share of documents to sample is above 0 and at most 1, not {self.sample}")
        for name in ("max_documents", "max_tokens", "shard_tokens", "max_chars"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', ' ')} must be at least 1, not {getattr(self, name)}")
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"no text has at least {self.min_chars} and at most {self.max_chars} characters")
        if self.instruction is not None and (self.min_chars or self.max_chars is not None or not self.append_eod):
            raise ValueError("conversations have no length in characters to choose by, and end as their template says")
        assert self.content_columns
        if self.min_chars < 0:
            raise ValueError(f"a text has no fewer than 0 characters; min chars is {self.min_chars}")
        if unknown := set(self.stop_on) - set(STOPPABLE):
            raise ValueError(f"what may stop a job is {', '.join(STOPPABLE)}; not {', '.join(sorted(unknown))}")
        for pattern in (self.url_include, self.url_exclude):
            _check_pattern(pattern)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the sets that are written; one without a name where there is no split."""
        if self.split_from:
            return SPLITS
        if not self.validation_fraction and not self.test_fraction:
            return ("",)
        wanted = ("train",) + (("validation",) if self.validation_fraction else ())
        return wanted + (("test",) if self.test_fraction else ())

    @property
    def content_columns(self) -> list[str]:
        """What documents are made from, where a file has columns."""
        return [self.text_column] if self.instruction is None else self.instruction.columns

    @property
    def columns(self) -> list[str]:
        """Columns, besides the content, that are worth reading; a file may lack them."""
        wanted = {self.id_column, self.domain_column}
        wanted |= {self.split_column} if len(self.splits) > 1 and not self.split_from else set()
        return sorted(wanted | set(self.needed_columns))

    @property
    def needed_columns(self) -> list[str]:
        """Columns, besides the content, that a file must have: what documents are chosen by."""
        wanted = {self.split_from} if self.split_from else set()
        wanted |= {"language_score"} if self.min_language_score is not None else set()
        wanted |= {"dump"} if self.dumps else set()
        # A column that somebody named is not to be missed by a typing error.
        names = {"id": self.id_column, "dump": self.domain_column, "url": self.split_column}
        wanted |= {column for default, column in names.items() if column != default}
        return sorted(wanted | ({"url"} if self.url_include or self.url_exclude else set()))


def _check_pattern(pattern: str) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        pc.match_substring_regex(pa.array([""], pa.large_string()), pattern)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{pattern!r} is no regular expression of RE2: {error}") from error
