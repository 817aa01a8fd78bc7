"""The guard of a run: judges its steps, tells what it found, and keeps what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_train.data.training_set import TrainingSet
from moe_train.training.engine import Engine
from moe_train.training.guard.explain import Documents, Place, documents_of, place_of, text_of
from moe_train.training.guard.left_out import (
    Rewind,
    from_plain,
    left_out,
    merged,
    read_rewinds,
    to_plain,
    write_rewinds,
)
from moe_train.training.guard.policy import Policy, Verdict
from moe_train.training.guard.replicas import ReplicaMismatch, differences
from moe_train.training.options import GuardOptions
from moe_train.training.step import Measured

Record = dict[str, Any]
ADVICE = (
    "the latest checkpoint is untouched. Try a smaller optimizer.lr, more schedule.warmup_steps or "
    "train.gradient_clipping; guard.* says what becomes of such steps (docs/guard.md)"
)


class BadNumbers(FloatingPointError):
    """The run stops because of a step's numbers."""


class Watch:
    """Collective but for ``leaves_out``, ``state`` and ``take_records``: all ranks call it alike.

    Records are of kind "guard" (docs/guard.md); they are complete on rank 0.
    """

    def __init__(
        self, options: GuardOptions, run_dir: Path, engine: Engine, samples: TrainingSet, batch_size: int
    ) -> None:
        self.options, self.run_dir, self.engine = options, run_dir, engine
        self.samples, self.batch_size = samples, batch_size
        self.policy = Policy(options)
        self.rewinds: list[Rewind] = []
        self.wants_rewind: Record | None = None
        """The record of the step that was refused, until the run has gone back."""
        self._records: list[Record] = []

    def judge(self, step: int, measured: Measured) -> bool:
        """Whether a step (from 1) is taken. BadNumbers where the run is to stop."""
        verdict = self.policy.judge(measured.loss, finite=measured.finite, rewinds=len(self.rewinds))
        if verdict.action == "take":
            return True
        record = self._record_of(step, measured, verdict)
        if verdict.action == "rewind":
            self.wants_rewind = record
        else:
            self._records.append(record)
        if verdict.action == "stop":
            raise BadNumbers(f"step {step}: {record['message']}; {ADVICE}")
        return verdict.action == "warn"

    def nowhere(self) -> BadNumbers:
        """The error of a run that is to go back and has no checkpoint yet."""
        assert self.wants_rewind is not None
        record, self.wants_rewind = self.wants_rewind, None
        text = f"{record['message']}; there is no checkpoint to go back to yet"
        self._records.append(record | {"action": "stop", "message": text})
        return BadNumbers(f"step {record['bad_step']}: {text}; {ADVICE}")

    def rewound(self, to_step: int) -> None:
        """The run has gone back to the checkpoint of this step: notes what is left out from now on."""
        assert self.wants_rewind is not None
        record, self.wants_rewind = self.wants_rewind, None
        bad = record["bad_step"]
        first = max(to_step + 1, bad - self.options.rewind_steps)
        self.rewinds = merged(self.rewinds, [Rewind(bad, to_step, first, record["cause"])])
        text = f"{record['message']}; back to step {to_step}, and the data of steps {first} to {bad} is left out"
        self._records.append(record | {"step": to_step, "first_left_out": first, "message": text})

    def keep(self) -> None:
        """Writes down what is left out, for a run that goes on from a checkpoint of before. OSError on rank 0."""
        if self.engine.groups.rank == 0:
            write_rewinds(self.run_dir, self.rewinds)

    def leaves_out(self, step: int) -> bool:
        """Whether the data of this step (from 1) is left out: it is neither read nor taken."""
        out = left_out(self.rewinds, step)
        if out and not left_out(self.rewinds, step - 1):
            text = "its data is left out since a rewind, and that of the steps that rewinds.json names"
            self._records.append(
                {"kind": "guard", "step": step, "bad_step": step, "action": "leave_out", "message": text}
            )
        return out

    def check_replicas(self, step: int, tokens: int) -> None:
        """Every so many steps: whether what must be equal on several ranks is. ReplicaMismatch where it is not, and
        the run is to stop then."""
        every = self.options.replica_every
        if not every or step % every:
            return
        counters = {"step": step, "tokens": tokens, "optimizer_steps": self.engine.optimizer_steps()}
        found = differences(self.engine, json.dumps([counters, self.state()]))
        if not found:
            return
        text = "; ".join(str(difference) for difference in found[:5])
        text += f"; and {len(found) - 5} more" if len(found) > 5 else ""
        text = f"replicas differ: {text}"
        self._records.append(
            {
                "kind": "guard",
                "step": step,
                "bad_step": step,
                "cause": "replicas",
                "action": self.options.replica_mismatch,
                "tensors": {difference.name: difference.ranks for difference in found},
                "message": text,
            }
        )
        if self.options.replica_mismatch == "stop":
            raise ReplicaMismatch(
                f"step {step}: {text}. Nothing of this step is saved; the latest checkpoint may hold what came of it "
                "since the comparison before: go on from it, and look at the memory of these machines"
            )

    def take_records(self) -> list[Record]:
        """What there is to tell since the last call."""
        records, self._records = self._records, []
        return records

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self.policy.state() | {"rewinds": to_plain(self.rewinds)}

    def restore(self, state: dict[str, Any]) -> None:
        """Of a checkpoint (empty for one of a run without a guard), and what the run's folder knows beyond it."""
        self.policy.restore(state)
        known: list[Any] = [read_rewinds(self.run_dir) if self.engine.groups.rank == 0 else None]
        dist.broadcast_object_list(known)
        self.rewinds = merged(from_plain(state.get("rewinds", ())), known[0])

    def summary(self) -> str:
        """What there was, for the end of the run; empty where there was nothing."""
        counts = {
            "steps skipped": self.policy.skipped,
            "spikes let through": self.policy.warned,
            "rewinds": len(self.rewinds),
        }
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)

    def _record_of(self, step: int, measured: Measured, verdict: Verdict) -> Record:
        place = Place()
        if verdict.cause in ("loss", "gradient"):
            place = place_of(self.engine, float(measured.own_loss))
        first = (step - 1) * self.batch_size
        documents = Documents()
        if self.engine.groups.rank == 0:
            try:
                documents = documents_of(self.samples, range(first, first + self.batch_size))
            except Exception as error:  # whatever it is: an explanation must not end a run
                print(f"warning: the documents of step {step} cannot be named: {error}", flush=True)
        details = text_of(place, documents)
        record: Record = {
            "kind": "guard",
            "step": step,
            "bad_step": step,
            "cause": verdict.cause,
            "action": verdict.action,
            "loss": measured.loss,
            "message": f"{verdict.reason}; {details}" if details else verdict.reason,
            "samples": [first, first + self.batch_size - 1],
            "documents": documents.numbers,
        }
        if documents.ids:
            record["document_ids"] = documents.ids
        if verdict.score is not None:
            record |= {"score": verdict.score, "median": verdict.median}
        if place.ranks:
            record["ranks"] = place.ranks
        if place.parameters:
            record["parameters"] = place.parameters
        return record
