"""What one run of a comparison came to: <run>/result.json, written last, so that a run that has one is finished.

Nothing else marks how far a comparison has got: a run is trained when its latest checkpoint is of the last step, and it
goes on from the latest checkpoint otherwise.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_train.checkpoint import store
from moe_train.checkpoint.state import read_state
from moe_train.data.files import write_atomically
from moe_train.data.options import label_of
from moe_train.evaluation.result import evaluation_path, read_evaluation
from moe_train.evaluation.run_files import Record, read_run
from moe_train.lab.plan import PlannedRun
from moe_train.training.account import active_parameters, flops_per_token, gate_facts, parameters
from moe_train.training.run_config import RunConfig, to_dict
from moe_train.training.run_folder import CHECKPOINTS, METRICS, holds_run, load

RESULT = "result.json"
_SHOWN = 6


def is_finished(run: PlannedRun) -> bool:
    return (run.folder / RESULT).is_file()


def is_trained(run: PlannedRun) -> bool:
    latest = store.latest(run.folder / CHECKPOINTS)
    return latest is not None and int(read_state(latest)["step"]) >= run.config.train.steps


def evaluation_file(run: PlannedRun) -> Path:
    """Where ``moe-train evaluate`` would put the same evaluation."""
    data = run.protocol.data or label_of(run.config.data.validation)
    return evaluation_path(run.folder, data, kind="-documents" if run.protocol.documents else "")


def read_result(run: PlannedRun) -> dict[str, Any]:
    """ValueError when the file is damaged."""
    path = run.folder / RESULT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {**found, "metrics": dict(found["metrics"])}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: delete it, and the run is evaluated again") from None


def write_result(run: PlannedRun, evaluation: Mapping[str, Any], processes: int) -> None:
    """``evaluation``: the JSON object of docs/evaluation.md, of the run's last step."""
    files, config = read_run(run.folder), run.config
    mean = evaluation.get("mean") or {}
    result = {
        "arm": run.arm,
        "seed": run.seed,
        "step": evaluation.get("step"),
        "protocol": dataclasses.asdict(run.protocol),
        "processes": processes,
        "metrics": {
            "loss": evaluation["loss"],
            "perplexity": evaluation.get("perplexity"),
            **{name: mean.get(name) for name in ("gini", "gini_floor", "min_max", "mean_k", "drop_rate")},
            "flops_per_token": measured_flops(config, mean.get("mean_k")),
            "tokens_per_second": throughput(files.train),
        },
        "alarms": alarms(run.folder / METRICS),
        "parameters": parameters(config).total,
        "active_parameters": active_parameters(config),
        "trained_tokens": files.train[-1].get("tokens") if files.train else None,
        "evaluated_tokens": evaluation.get("tokens"),
        "unigram_entropy": evaluation.get("unigram_entropy"),
        "layers": [layer["layer"] for layer in evaluation["layers"]],
        "load": [layer["load"] for layer in evaluation["layers"]],
        "environment": {name: files.environment.get(name) for name in ("date", "commit", "device", "python")},
    }
    write_atomically(run.folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())


def alarms(metrics: Path) -> dict[str, int]:
    """Cause -> number of layers in which an alarm of it began, from the records of kind "alarm" of metrics.jsonl."""
    found: defaultdict[str, set[object]] = defaultdict(set)
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        if '"alarm"' in line:
            record = json.loads(line)
            if record.get("kind") == "alarm" and record.get("state") == "began":
                found[str(record.get("cause"))].add(record.get("layer"))
    return {cause: len(layers) for cause, layers in found.items()}


def measured_flops(config: RunConfig, mean_k: float | None) -> float:
    """Forward and backward FLOPs per token with the experts that tokens took in the evaluation, not the gate's bound.

    mean_k: experts per token, averaged over the layers; None in a family without experts.
    """
    flops, counted = flops_per_token(config), gate_facts(config).counted_k
    if mean_k is None or not counted:
        return flops.total
    return dataclasses.replace(flops, experts=flops.experts * mean_k / counted).total


def throughput(records: Sequence[Record]) -> float | None:
    """Training tokens per second over all recorded intervals but the first, which contains the warming up."""
    tokens = seconds = 0.0
    before = 0
    for number, record in enumerate(records):
        passed, before = record["tokens"] - before, record["tokens"]
        if (number or len(records) == 1) and record.get("tokens_per_second"):
            tokens, seconds = tokens + passed, seconds + passed / record["tokens_per_second"]
    return tokens / seconds if seconds else None


def evaluated(run: PlannedRun, path: Path) -> dict[str, Any]:
    """The evaluation at ``path``; ValueError when it is not of the last step."""
    evaluation = read_evaluation(path)
    if evaluation.get("step") != run.config.train.steps:
        raise ValueError(f"{path} is of step {evaluation.get('step')}, not of the last, {run.config.train.steps}")
    return evaluation


def check_same_experiment(runs: Sequence[PlannedRun], out: Path, source: str) -> None:
    """ValueError when results in ``out`` are of another experiment than ``source`` describes now, with what differs.

    New arms and seeds are welcome; what an arm that has begun is, and how it is evaluated, must not change.
    """
    for run in runs:
        found = differences(run)
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ValueError(
                f"{run.folder} holds results of another experiment than {source} describes: "
                f"{'; '.join(found[:_SHOWN])}{more}. Choose another folder with --out, or delete {run.folder}"
            )


def differences(run: PlannedRun) -> list[str]:
    """What differs between the run that is planned and the one in its folder, one line for each key."""
    found: list[str] = []
    if holds_run(run.folder):
        try:
            found += _differing(to_dict(load(run.folder)), to_dict(run.config))
        except ValueError as error:
            return [f"its configuration cannot be read ({error})"]
    if is_finished(run):
        protocol = read_result(run).get("protocol") or {}
        found += _differing(protocol, dataclasses.asdict(run.protocol), "evaluation.")
    return found


def _differing(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in dict.fromkeys([*before, *now])
            for line in _differing(before.get(key), now.get(key), f"{path}{key}.")
        ]
    return [] if before == now else [f"{path[:-1]} was {json.dumps(before)}, is {json.dumps(now)}"]
