"""What one run of a comparison came to: <run>/result.json, written last, so that a run that has one is finished.

Nothing else marks how far a comparison has got: a run is trained when its latest checkpoint is of the last step, and it
goes on from the latest checkpoint otherwise.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_train.checkpoint import store
from moe_train.checkpoint.state import read_state
from moe_train.data.files import write_atomically
from moe_train.data.options import label_of
from moe_train.evaluation.result import evaluation_path, read_evaluation
from moe_train.evaluation.run_files import read_run
from moe_train.lab.measures import (
    alarms,
    alarms_on_at_end,
    measured_flops,
    published_metrics,
    starts,
    throughput,
    training_mean,
)
from moe_train.lab.plan import PlannedRun
from moe_train.training.account import active_parameters, parameters
from moe_train.training.run_config import to_dict
from moe_train.training.run_folder import CHECKPOINTS, METRICS, holds_run, load

RESULT = "result.json"
FORMAT = 4
"""1 (without this key): no figures of `measures.published_metrics`, drops of the evaluation only; 2: no mean k of the
training; 3: not which alarms were on at the end."""
_SHOWN = 6


def is_finished(run: PlannedRun) -> bool:
    return (run.folder / RESULT).is_file()


def seeds_in(out: Path, arms: Iterable[str]) -> list[int]:
    """Seeds with which one of the arms has finished in the folder of a comparison."""
    paths = [path for arm in arms for path in (out / arm).glob(f"seed_*/{RESULT}")]
    numbers = (path.parent.name.removeprefix("seed_") for path in paths)
    return sorted({int(number) for number in numbers if number.isascii() and number.isdecimal()})


def is_trained(run: PlannedRun) -> bool:
    latest = store.latest(run.folder / CHECKPOINTS)
    return latest is not None and int(read_state(latest)["step"]) >= run.config.train.steps


def evaluation_file(run: PlannedRun) -> Path:
    """Where ``moe-train evaluate`` would put the same evaluation."""
    data = run.protocol.data or label_of(run.config.data.validation)
    return evaluation_path(run.folder, data, kind="-documents" if run.protocol.documents else "")


def read_result(run: PlannedRun) -> dict[str, Any]:
    """The file as it is, of this version or an earlier one. ValueError when it is damaged."""
    path = run.folder / RESULT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {**found, "metrics": dict(found["metrics"])}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: delete it, and the run is evaluated again") from None


def current_result(run: PlannedRun) -> dict[str, Any]:
    """The result as this version writes it. That of an earlier version is written anew from the evaluation that it came
    from; where that is gone, what cannot be known any more is None. Nothing is trained or evaluated."""
    found = read_result(run)
    if found.get("format", 1) >= FORMAT:
        return found
    if found.get("format") == 3:
        return found | {"alarms_on_at_end": _on_at_end(run)}
    try:
        evaluation = evaluated(run, evaluation_file(run))
    except (OSError, ValueError):
        evaluation = None
    if evaluation is None or evaluation["loss"] != found["metrics"].get("loss"):  # replaced by hand since then
        return _as_far_as_known(run, found)
    write_result(run, evaluation, found.get("processes", 1))
    return read_result(run)


def _as_far_as_known(run: PlannedRun, found: dict[str, Any]) -> dict[str, Any]:
    """Format 1 counted drops in the evaluation only, and active parameters with the gate's bound on k; format 2 had no
    mean k of the training."""
    metrics = found["metrics"]
    records = read_run(run.folder).train
    known = {
        "evaluation_drop_rate": metrics.get("evaluation_drop_rate", metrics.get("drop_rate")),
        "drop_rate": training_mean(records, "drop_rate"),
        "training_mean_k": training_mean(records, "mean_k"),
    }
    return {
        **found,
        "gate": run.config.router.gate,
        "alarms_on_at_end": _on_at_end(run),
        "metrics": metrics | known,
        "active_parameters": active_parameters(run.config, metrics.get("mean_k")),
    }


def _on_at_end(run: PlannedRun) -> dict[str, int] | None:
    """None where the records are gone, or do not say it."""
    if not (run.folder / METRICS).is_file():
        return None
    files, config = read_run(run.folder), run.config
    started = starts(files.environment, files.train, config.logging.every)
    return alarms_on_at_end(files.alarms, started, config.train.steps, config.alarm.window)


def write_result(run: PlannedRun, evaluation: Mapping[str, Any], processes: int) -> None:
    """``evaluation``: the JSON object of docs/evaluation.md, of the run's last step."""
    files, config = read_run(run.folder), run.config
    mean = evaluation.get("mean") or {}
    started = starts(files.environment, files.train, config.logging.every)
    result = {
        "format": FORMAT,
        "arm": run.arm,
        "seed": run.seed,
        "gate": config.router.gate,
        "step": evaluation.get("step"),
        "protocol": dataclasses.asdict(run.protocol),
        "processes": processes,
        "metrics": {
            "loss": evaluation["loss"],
            "perplexity": evaluation.get("perplexity"),
            **{name: mean.get(name) for name in ("gini", "gini_floor", "min_max", "mean_k")},
            "training_mean_k": training_mean(files.train, "mean_k"),
            "drop_rate": training_mean(files.train, "drop_rate"),
            "evaluation_drop_rate": mean.get("drop_rate"),
            "flops_per_token": measured_flops(config, mean.get("mean_k")),
            "tokens_per_second": throughput(files.train, started),
            **published_metrics(evaluation),
        },
        "alarms": alarms(files.alarms),
        "alarms_on_at_end": _on_at_end(run),
        "parameters": parameters(config).total,
        "active_parameters": active_parameters(config, mean.get("mean_k")),
        "trained_tokens": files.train[-1].get("tokens") if files.train else None,
        "evaluated_tokens": evaluation.get("tokens"),
        "unigram_entropy": evaluation.get("unigram_entropy"),
        "layers": [layer["layer"] for layer in evaluation["layers"]],
        "load": [layer["load"] for layer in evaluation["layers"]],
        "environment": {name: files.environment.get(name) for name in ("date", "commit", "device", "python")},
    }
    write_atomically(run.folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())


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
