"""The figures of a run that no single file states: they come from its records and its evaluation together."""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from moe_train.evaluation.run_files import Record
from moe_train.training.account import flops_per_token, gate_facts
from moe_train.training.run_config import RunConfig

Number = float | None


def alarms(records: Sequence[Record]) -> dict[str, int]:
    """Cause -> number of layers in which an alarm of it began.   records: those of kind "alarm"."""
    return _layers((cause, layer) for layer, cause, _ in _begun(records))


def alarms_on_at_end(
    records: Sequence[Record], started: Collection[int], steps: int, window: int
) -> dict[str, int] | None:
    """Cause -> number of layers in which an alarm of it is on after the last step, for each cause that ever began.

    started: steps behind which processes of the run began.   steps: of the whole run.   window: steps after which an
    alarm ends that has no cause any more. Processes know nothing of the alarms before them, and say again what still
    holds: what the last ones said counts. None where one was on when they began and they had no ``window`` of steps.
    """
    begun = _begun(records)
    last = max(step for step in started if step < steps)
    on = begun - {(r.get("layer"), str(r.get("cause")), r.get("began")) for r in records if r.get("state") == "ended"}
    forgotten = {alarm for alarm in on if alarm[2] <= last}
    if forgotten and steps - last < window:
        return None
    none = {cause: 0 for _, cause, _ in begun}
    found = none | _layers((cause, layer) for layer, cause, _ in on - forgotten)
    return dict(sorted(found.items()))


def _begun(records: Sequence[Record]) -> set[tuple[Any, str, int]]:
    """Layer, cause and step of all that began."""
    return {(r.get("layer"), str(r.get("cause")), r["step"]) for r in records if r.get("state") == "began"}


def _layers(found: Iterable[tuple[str, Any]]) -> dict[str, int]:
    """Pairs of a cause and a layer -> the number of different layers of each cause."""
    return dict(sorted(Counter(cause for cause, _ in set(found)).items()))


def measured_flops(config: RunConfig, mean_k: float | None) -> float:
    """Forward and backward FLOPs per token with the experts that tokens took in the evaluation.

    mean_k: experts per token, averaged over the layers; None in a family without experts.
    """
    flops, counted = flops_per_token(config), gate_facts(config).counted_k
    if mean_k is None or not counted:
        return flops.total
    return dataclasses.replace(flops, experts=flops.experts * mean_k / counted).total


def starts(environment: Mapping[str, Any], records: Sequence[Record], every: int) -> set[int]:
    """Steps behind which processes of the run began: 0, and wherever it went on.

    environment: environment.json, which lists all starts.   every: steps between two records. Starts of versions that
    did not write their step show only where the run was stopped between two records: the stop wrote one of its own.
    """
    launches = [*environment.get("earlier", []), environment]
    found = {step for launch in launches if isinstance(step := launch.get("after_step"), int)}
    return {0} | found | {record["step"] for record in records if record["step"] % every}


def throughput(records: Sequence[Record], after: Collection[int] = (0,)) -> float | None:
    """Training tokens per second over all recorded intervals but the first behind each of the steps ``after``, which
    contains the warming up of new processes; over all of them where there is no other."""
    steps = [record["step"] for record in records]
    warming = {bisect.bisect_right(steps, start) for start in after}
    measured = [
        (tokens, tokens / record["tokens_per_second"], number in warming)
        for number, (tokens, record) in enumerate(_intervals(records))
        if record.get("tokens_per_second")
    ]
    kept = [(tokens, seconds) for tokens, seconds, warms in measured if not warms]
    kept = kept or [(tokens, seconds) for tokens, seconds, _ in measured]
    seconds = sum(part for _, part in kept)
    return sum(tokens for tokens, _ in kept) / seconds if seconds else None


def training_mean(records: Sequence[Record], name: str) -> float | None:
    """``balance/<name>`` (the mean over the layers) of the training: its mean over the recorded intervals, weighted by
    their tokens; None where none was recorded. Of ``drop_rate`` the share of the slots that capacity took away."""
    found = [
        (tokens, value)
        for tokens, record in _intervals(records)
        if (value := record.get(f"balance/{name}")) is not None and tokens > 0
    ]
    total = sum(tokens for tokens, _ in found)
    return sum(tokens * value for tokens, value in found) / total if total else None


def published_metrics(evaluation: Mapping[str, Any]) -> dict[str, Number]:
    """What the published code of latent prototype routing meters (docs/evaluation.md), the meters averaged over the
    layers; None where the evaluation has no such figure."""
    documents = evaluation.get("documents") or {}
    found: dict[str, Number] = {
        "loss_batch_average": documents.get("loss_batch_average"),
        "perplexity_batch_average": documents.get("perplexity_batch_average"),
    }
    meters = [layer.get("moving_average_of_lpr") or {} for layer in evaluation["layers"]]
    for kind in ("unmasked", "masked"):
        for name in ("gini", "min_max"):
            values = [(meter.get(kind) or {}).get(name) for meter in meters]
            known = [value for value in values if value is not None]
            found[f"meter_{name}_{kind}"] = sum(known) / len(known) if values and known == values else None
    return found


def _intervals(records: Sequence[Record]) -> Iterator[tuple[int, Record]]:
    """Each record with the tokens of its interval."""
    before = 0
    for record in records:
        yield record["tokens"] - before, record
        before = record["tokens"]
