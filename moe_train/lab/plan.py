"""From an experiment to its runs, all checked before the first one starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.config.compose import compose
from moe_train.config.errors import ConfigError, Problem
from moe_train.data.options import DataOptions
from moe_train.lab.experiment import EvaluationProtocol, Experiment, dotted, reserved
from moe_train.training.options import TrainOptions
from moe_train.training.run_config import RunConfig, check, from_dict


@dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed."""

    arm: str
    seed: int
    config: RunConfig
    folder: Path
    protocol: EvaluationProtocol

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"


def plan(
    experiment: Experiment,
    out: Path,
    *,
    source: str,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> list[PlannedRun]:
    """The runs in their order: all arms of the first seed, then of the next, so that a first table comes early.

    overrides: ``key=value`` for every arm, after its own.   seeds: in place of the experiment's, where any are given.
    source: the experiment's file, for messages.
    Every arm's configuration is built and checked: ConfigError lists the problems of all. What depends on the number of
    processes is for `check_processes`.
    """
    problems = list(reserved(list(overrides), ""))
    if any(seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        problems.append(Problem("--seeds", f"must be different numbers of at least 0, got {list(seeds)}"))
    configs: dict[str, RunConfig] = {}
    for arm, changes in experiment.arms.items():
        try:
            configs[arm] = arm_config(experiment, arm, changes, overrides)
        except ConfigError as error:
            problems += [Problem(f"arms.{arm}", str(problem)) for problem in error.problems]
    if problems:
        raise ConfigError(problems, source)
    return [
        PlannedRun(
            arm=arm,
            seed=seed,
            config=dataclasses.replace(config, seed=seed),
            folder=run_folder(out, arm, seed),
            protocol=experiment.evaluation,
        )
        for seed in (seeds or experiment.seeds)
        for arm, config in configs.items()
    ]


def check_processes(runs: Sequence[PlannedRun], processes: int, source: str) -> None:
    """ConfigError where an arm does not fit so many processes."""
    problems: list[Problem] = []
    for arm, config in {run.arm: run.config for run in runs}.items():
        try:
            check(config, processes, source=arm)
        except ConfigError as error:
            problems += [Problem(f"arms.{arm}", str(problem)) for problem in error.problems]
    if problems:
        raise ConfigError(problems, source)


def run_folder(out: Path, arm: str, seed: int) -> Path:
    return out / arm / f"seed_{seed}"


def arm_config(experiment: Experiment, arm: str, changes: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    """The configuration of an arm with the experiment's first seed, checked but for the number of processes."""
    lines = [*dotted(experiment.overrides), *dotted(changes), *overrides]
    data = compose(experiment.base, lines)
    steps = experiment.budget.steps_of(_tokens_per_step(data))
    data["name"], data["seed"] = arm, experiment.seeds[0]
    train = data.setdefault("train", {})
    if isinstance(train, dict):  # What else it may be, from_dict refuses.
        train["steps"] = steps
    config = from_dict(data, source=arm)
    protocol = experiment.evaluation
    if not protocol.data and not config.data.validation:
        raise ConfigError([Problem("data.validation", "is empty, and evaluation.data too: name one of them")], arm)
    return config


def _tokens_per_step(data: dict[str, Any]) -> int:
    """Positions of an optimizer step in a configuration that is not checked yet."""
    size = _number(data.get("train"), "global_batch_size", TrainOptions.global_batch_size)
    return size * _number(data.get("data"), "sequence_length", DataOptions.sequence_length)


def _number(section: Any, key: str, default: int) -> int:
    value = section.get(key, default) if isinstance(section, dict) else default
    return value if isinstance(value, int) and value > 0 else default
