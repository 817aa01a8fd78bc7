"""The collapse alarm: says when the routing of a layer goes wrong, and what to try. It never stops a run.

Suffixes: L MoE layers in order, E experts.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

import torch
from torch import Tensor

from moe_train.training.callbacks.base import Callback, Record, Status
from moe_train.training.callbacks.layer_watch import CAUSES, LayerWatch, Numbers
from moe_train.training.options import AlarmOptions

if TYPE_CHECKING:
    from moe_train.training.step import StepResult

_SHOWN = 8


class CollapseAlarm(Callback):
    """An alarm of a layer and a cause begins once, and ends when the cause was gone for ``options.window`` steps.

    Each beginning and end is a record of kind "alarm"; at the end of the run their numbers are printed. Nothing of it
    is in checkpoints: a run that goes on looks at its own steps only, and says again what still holds.
    advice: what to try, by cause.   target_load: wanted shares of the experts in any unit; None for equal ones.
    """

    def __init__(
        self,
        options: AlarmOptions,
        advice: Mapping[str, str] | None = None,
        target_load: Sequence[float] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.options, self.advice, self.target_load = options, dict(advice or {}), target_load
        self.stream = stream or sys.stdout
        self.begun: Counter[str] = Counter()
        """Alarms by cause since the start."""
        self._watches: dict[int, LayerWatch] = {}
        self._ringing: dict[tuple[int, str], int] = {}
        self._quiet_since: dict[tuple[int, str], int] = {}
        self._judged = False
        self._broken = False

    def on_step(self, step: int, result: StepResult) -> list[Record]:
        """The records of this step. A mistake in the alarm itself switches it off and says so."""
        if self._broken or step <= self.options.quiet_steps or not result.layers:
            return []
        try:
            self._judged = True
            return self._look(step, result)
        except Exception as error:
            self._broken = True
            print(f"warning: the collapse alarm is off from step {step} on: {error!r}", file=sys.stderr)
            return []

    def on_end(self, status: Status) -> None:
        if not self._judged:
            return
        if not self.begun:
            print("collapse alarm: quiet", file=self.stream, flush=True)
            return
        causes = ", ".join(f"{cause} {self.begun[cause]}" for cause in CAUSES if self.begun[cause])
        still = f"; {len(self._ringing)} still on" if self._ringing else "; all over"
        print(f"collapse alarm: {sum(self.begun.values())} ({causes}){still}", file=self.stream, flush=True)

    def _look(self, step: int, result: StepResult) -> list[Record]:
        records: list[Record] = []
        for layer, load_E, z in zip(result.layers, result.load_LE, result.z, strict=True):
            if layer not in self._watches:
                self._watches[layer] = LayerWatch(self.options, self._shares(len(load_E)))
            found = self._watches[layer].add(load_E, result.tokens, z)
            for cause in CAUSES:
                if cause in found:
                    self._quiet_since.pop((layer, cause), None)
                    if (layer, cause) not in self._ringing:
                        records.append(self._begin(step, layer, cause, found[cause]))
                elif (layer, cause) in self._ringing:
                    since = self._quiet_since.setdefault((layer, cause), step)
                    if step - since + 1 >= self.options.window:
                        records.append(self._end(step, layer, cause))
        return records

    def _shares(self, experts: int) -> Tensor:
        if self.target_load is None:
            return torch.full((experts,), 1 / experts, dtype=torch.float64)
        target_E = torch.tensor(self.target_load, dtype=torch.float64)
        return target_E / target_E.sum()

    def _begin(self, step: int, layer: int, cause: str, numbers: Numbers) -> Record:
        self._ringing[layer, cause] = step
        # The advice of a cause is the same for all layers: it is given once, and with every record.
        first = cause not in self.begun
        self.begun[cause] += 1
        message = f"layer {layer}: {describe(cause, numbers, self.options)}"
        advice = self.advice.get(cause, "")
        return {
            **self._record(step, layer, cause, "began"),
            **numbers,
            "message": message,
            "advice": advice,
            "line": f"{message}. Try {advice}" if first and advice else message,
        }

    def _end(self, step: int, layer: int, cause: str) -> Record:
        began = self._ringing.pop((layer, cause))
        self._quiet_since.pop((layer, cause), None)
        message = f"layer {layer}: {cause} is over (it began at step {began:,})"
        return {**self._record(step, layer, cause, "ended"), "began": began, "message": message, "line": message}

    def _record(self, step: int, layer: int, cause: str, state: str) -> Record:
        layers = sum(other == cause for _, other in self._ringing)
        return {"kind": "alarm", "step": step, "cause": cause, "layer": layer, "state": state, "layers_on": layers}


def describe(cause: str, numbers: Numbers, options: AlarmOptions) -> str:
    """A cause and its numbers in words."""
    steps = f"the last {numbers['steps']:,} steps"
    if cause == "dead_experts":
        return f"{_experts(numbers['experts'])} got no token in {steps}"
    if cause == "load_share":
        least = f"the least {numbers['value']:.3g} of it"
        return (
            f"{_experts(numbers['experts'])} got less than {options.load_share:g} of an even share ({least}) in {steps}"
        )
    if cause == "entropy":
        return (
            f"the entropy of the load is {numbers['value']:.3f} in {steps} (1 is even, alarm below {options.entropy:g})"
        )
    growth = f"{numbers['value']:.4g} from {numbers['lowest']:.4g} within {steps}"
    return f"the mean of logsumexp(logits)^2 (z-loss) rose to {growth}"


def _experts(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"expert{'s' if len(numbers) > 1 else ''} {shown}{more}"
