"""A small experiment file, plans of it, and a runner that starts nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from moe_train.checkpoint.state import STATE, state_bytes
from moe_train.lab.experiment import load_experiment
from moe_train.lab.plan import PlannedRun, plan
from moe_train.training.run_config import to_yaml

CONTENT: dict[str, Any] = {
    "title": "Two arms",
    "base": "tiny",
    "seeds": [1, 2],
    "budget": {"steps": 8},
    "baseline": "plain",
    "arms": {"plain": {"parts.router": "softmax_top2"}, "free": {"parts": {"router": "dynamic_k_free"}}},
    "labels": {"free": "k < | $x$ <free>"},
}


def write(path: Path, **changes: Any) -> Path:
    """The file with keys replaced; None takes one away."""
    content = {key: value for key, value in {**CONTENT, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def planned(folder: Path, **changes: Any) -> list[PlannedRun]:
    path = write(folder / "two.yaml", **changes)
    _, _, experiment = load_experiment(str(path))
    return plan(experiment, folder / "out", source=str(path))


def evaluation(run: PlannedRun, loss: float) -> dict[str, Any]:
    """As ``moe-train evaluate`` writes it; every eighth of the load goes to an expert, the last has none."""
    load = [10 * (1 + (run.seed + expert) % 3) for expert in range(7)] + [0]
    mean = {"gini": 0.2 + run.seed / 100, "gini_floor": 0.003, "min_max": 0.0, "mean_k": 2.5, "drop_rate": 0.0}
    return {
        "step": run.config.train.steps,
        "data": "data/demo/validation",
        "loss": loss,
        "perplexity": 2.718281828**loss,
        "tokens": 1000,
        "unigram_entropy": 6.5,
        "layers": [
            {"layer": layer, **mean, "load": load, "kept": load, "moving_average_of_lpr": meter(layer)}
            for layer in range(2)
        ],
        "mean": mean,
        "documents": {"loss_batch_average": loss + 0.25, "perplexity_batch_average": 2.718281828 ** (loss + 0.25)},
    }


def meter(layer: int) -> dict[str, Any]:
    """Of a gate whose choices at padding are not known."""
    return {"masked": {"gini": 0.1 + layer / 5, "min_max": 1e-9}, "unmasked": None}


class FakeRunner:
    """Trains by writing files. ``codes``: exit codes of the next trainings, 0 when they are used up."""

    processes = 1

    def __init__(self, codes: list[int] | None = None) -> None:
        self.codes = codes or []
        self.trained: list[str] = []
        self.evaluated: list[str] = []

    def train(self, run: PlannedRun) -> int:
        self.trained.append(run.name)
        code = self.codes.pop(0) if self.codes else 0
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "config.yaml").write_text(to_yaml(run.config))
        steps = run.config.train.steps
        lines = [record(run, step) for step in range(2, steps + 1, 2)]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run.folder / "environment.json").write_text(json.dumps({"commit": "abc", "device": "cpu: x", "date": "d"}))
        if code == 0:
            save(run.folder / "checkpoints", steps)
        return code

    def evaluate(self, run: PlannedRun, output: Path) -> int:
        self.evaluated.append(run.name)
        output.parent.mkdir(exist_ok=True)
        loss = {"plain": 4.0, "free": 3.5}[run.arm] + run.seed / 10
        output.write_text(json.dumps(evaluation(run, loss)))
        return 0


def record(run: PlannedRun, step: int) -> dict[str, Any]:
    tokens = step * 256
    speed = 10.0 if step == 2 else 1000.0
    return {
        "kind": "train",
        "step": step,
        "tokens": tokens,
        "loss": 9.0 - step / 10 + run.seed,
        "tokens_per_second": speed,
        "balance/gini": 0.5,
        "balance/drop_rate": 0.25 if step == 2 else 0.05,
        "balance/mean_k": 5.0 if step == 2 else 3.0,
    }


def save(root: Path, step: int) -> None:
    """An empty checkpoint that counts as complete."""
    directory = root / f"step_{step:08d}"
    directory.mkdir(parents=True)
    (directory / STATE).write_bytes(state_bytes({"step": step}, b""))
    (root / "latest").write_text(directory.name)
