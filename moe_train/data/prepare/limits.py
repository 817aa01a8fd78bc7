"""Where the documents of a job end, as results of its pieces come in, in any order."""

from __future__ import annotations

import numpy as np

from moe_train.data.prepare.part import Part, PartFacts
from moe_train.data.prepare.work import Context, PieceTask, Task


class Limits:
    """Adds up the pieces that are done from the first one on."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._waiting: dict[int, PartFacts] = {}
        self._documents = self._tokens = 0
        self._last: tuple[int, int] | None = None
        """The last piece counted that has documents, and how many."""
        self.next = 0
        """First piece that is not counted yet."""
        self.cut: tuple[int, int] | None = None
        """The last piece of the job, and how many of its documents are taken; None where all pieces are whole."""
        self.error = False
        """Whether some piece that may count cannot be done."""

    def add(self, number: int, facts: PartFacts) -> None:
        self._waiting[number] = facts
        self.error = self.error or facts.error is not None
        while self.cut is None and (found := self._waiting.get(self.next)) is not None and found.error is None:
            del self._waiting[self.next]
            self._count(found)

    def retry(self) -> PieceTask | None:
        """Where a piece failed that the job may end in: the task that shows whether it ends before the row at fault."""
        failed = self.cut is None and (found := self._waiting.get(self.next)) is not None and found.error is not None
        documents, tokens = self._room()
        return PieceTask(self.next, documents, tokens) if failed and (documents, tokens) != (None, None) else None

    def add_retried(self, facts: PartFacts) -> None:
        """The result of that task. The piece stays failed where the job does not end in it."""
        if facts.error is None and self._is_over(facts):
            del self._waiting[self.next]
            self._cut(facts, self._context.part(self.next, cut=True))

    def check(self) -> None:
        """ValueError where a piece that counts could not be done: the first one in source order."""
        errors = {number: facts.error for number, facts in self._waiting.items() if facts.error is not None}
        if errors and self.cut is None:
            raise ValueError(errors[min(errors)])

    def is_behind(self, task: Task) -> bool:
        """Whether the job ends before this piece or source, as far as is known."""
        if isinstance(task, PieceTask):
            return task.piece >= self.end
        return task.file > self._context.pieces[self.end - 1].files[-1]

    @property
    def end(self) -> int:
        """Number of pieces that the job has, as far as is known."""
        return len(self._context.pieces) if self.cut is None else self.cut[0] + 1

    def _count(self, facts: PartFacts) -> None:
        if self._is_over(facts):
            self._cut(facts, self._context.part(self.next))
            return
        if facts.documents:
            self._last = (self.next, facts.documents)
        self._documents += facts.documents
        self._tokens += facts.tokens
        self.next += 1

    def _room(self) -> tuple[int | None, int | None]:
        """Documents and tokens that may still come."""
        options = self._context.options
        documents = None if options.max_documents is None else options.max_documents - self._documents
        return documents, None if options.max_tokens is None else options.max_tokens - self._tokens

    def _is_over(self, facts: PartFacts) -> bool:
        documents, tokens = self._room()
        full = documents is not None and facts.documents >= documents
        return full or (tokens is not None and facts.tokens > tokens)

    def _cut(self, facts: PartFacts, part: Part) -> None:
        documents, tokens = self._room()
        taken = facts.documents if documents is None else min(documents, facts.documents)
        if tokens is not None:
            ends = np.cumsum(part.table(["length"]).column("length").to_numpy())
            taken = min(taken, int(np.searchsorted(ends, tokens, side="right")))
        # A piece that gives nothing more: the job ends with the last document of an earlier one.
        self.cut = (self.next, taken) if taken or self._last is None else self._last
