"""What is to become of a step, by its numbers, the policies and what has happened before. No communication: every rank
has the same numbers and comes to the same verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from moe_train.training.guard.losses import Losses
from moe_train.training.options import GuardOptions

Action = Literal["take", "warn", "skip", "rewind", "stop"]


@dataclass(frozen=True)
class Verdict:
    action: Action = "take"
    """The step counts with "take" and "warn" only."""
    cause: Literal["", "loss", "gradient", "spike"] = ""
    reason: str = ""
    score: float | None = None
    median: float | None = None
    """Of the losses before, where the cause is a spike."""


class Policy:
    """Judges the steps of a run in their order; what it remembers is in the run's checkpoints."""

    def __init__(self, options: GuardOptions) -> None:
        self.options = options
        self.losses = Losses(options.window)
        self.in_a_row = 0
        """Skipped steps since the last one that was taken."""
        self.skipped = 0
        """Skipped steps of the whole run."""
        self.warned = 0

    def judge(self, loss: float, *, finite: bool, rewinds: int) -> Verdict:
        """The verdict on the next step, which is then what happens.

        loss: mean over all target tokens.   finite: whether the gradients are.   rewinds: how many there were.
        """
        verdict = self._bounded(self._first(loss, finite), rewinds)
        if verdict.action in ("take", "warn"):
            self.in_a_row = 0
            self.losses.add(loss)
            self.warned += verdict.action == "warn"
        elif verdict.action == "skip":
            self.in_a_row += 1
            self.skipped += 1
        return verdict

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "losses": list(self.losses.values),
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "warned": self.warned,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """``state``: of a checkpoint; empty for one of a run that was not judged."""
        self.losses = Losses(self.options.window, state.get("losses", ()))
        self.in_a_row = state.get("in_a_row", 0)
        self.skipped = state.get("skipped", 0)
        self.warned = state.get("warned", 0)

    def _first(self, loss: float, finite: bool) -> Verdict:
        """Without the bounds on how often."""
        options = self.options
        if not math.isfinite(loss):
            return Verdict(options.non_finite, "loss", f"the loss is {loss}")
        if not finite:
            return Verdict(options.non_finite, "gradient", f"a gradient is not finite (the loss is {loss:.4f})")
        score = self.losses.score(loss) if options.spike != "ignore" else None
        if score is None or score < options.threshold:
            return Verdict()
        median = self.losses.median()
        reason = (
            f"the loss {loss:.4f} is a spike: {score:.1f} robust standard deviations above {median:.4f}, the median "
            f"of {options.window} steps"
        )
        return Verdict(options.spike, "spike", reason, score, median)  # type: ignore[arg-type]  # "ignore" is out

    def _bounded(self, verdict: Verdict, rewinds: int) -> Verdict:
        options = self.options
        why = ""
        if verdict.action == "skip" and self.in_a_row >= options.max_in_a_row:
            why = f"guard.max_in_a_row = {options.max_in_a_row} steps in a row were skipped already"
        elif verdict.action == "skip" and self.skipped >= options.max_skips:
            why = f"guard.max_skips = {options.max_skips} steps of the run were skipped already"
        elif verdict.action == "rewind" and rewinds >= options.max_rewinds:
            why = f"guard.max_rewinds = {options.max_rewinds} rewinds have been made already"
        if not why:
            return verdict
        return Verdict("stop", verdict.cause, f"{verdict.reason}; {why}", verdict.score, verdict.median)
