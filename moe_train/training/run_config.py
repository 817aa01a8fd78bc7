"""The configuration of one run: the options of every room in one frozen dataclass, loaded and checked as a whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moe_train.config.compose import compose
from moe_train.config.errors import ConfigError, Problem
from moe_train.config.validate import build
from moe_train.data.options import DataOptions
from moe_train.model.options import ModelOptions
from moe_train.parallel.options import ParallelOptions
from moe_train.routing.options import RouterOptions
from moe_train.training.options import (
    AlarmOptions,
    CheckpointOptions,
    EvalOptions,
    GuardOptions,
    LoggingOptions,
    OptimizerOptions,
    ProfileOptions,
    ScheduleOptions,
    TrainOptions,
)


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"
    """Name of the run; its folder is runs/<name> unless another one is given."""
    seed: int = 0
    causal_exceptions: list[str] = field(default_factory=list)
    """What may look at later tokens in this run: names of gates, or `capacity`."""
    model: ModelOptions = field(default_factory=ModelOptions)
    router: RouterOptions = field(default_factory=RouterOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    alarm: AlarmOptions = field(default_factory=AlarmOptions)
    guard: GuardOptions = field(default_factory=GuardOptions)
    profile: ProfileOptions = field(default_factory=ProfileOptions)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Passed through to DeepSpeed's configuration; keys that this project sets itself are refused."""

    @property
    def layout_size(self) -> int:
        """Processes that one copy of the model needs: the number of processes is a multiple of this. Experts are spread
        over the ranks that share tensors, too."""
        parallel = self.parallel
        return math.lcm(parallel.expert, parallel.tensor) * parallel.pipeline * parallel.context

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that read different samples."""
        parallel = self.parallel
        return world_size // (parallel.tensor * parallel.pipeline * parallel.context)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per optimizer step and rank."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data_parallel_size(world_size))


def load_run_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration at a path, or the shipped experiment of that name, with ``key=value`` overrides.

    Everything that does not depend on the number of processes is checked; ``check`` does the rest. Raises ConfigError
    (a ValueError) that lists every problem with its key, or ValueError when there is no such configuration.
    """
    return from_dict(compose(str(name_or_path), overrides), source=str(name_or_path))


def from_dict(data: dict[str, Any], source: str = "configuration") -> RunConfig:
    """As ``load_run_config``, from nested dictionaries."""
    if early := [*_zero_0(data)]:
        raise ConfigError(early, source)
    config = build(RunConfig, data, source=source)
    config = dataclasses.replace(config, router=_with_gate_options(config.router, source))
    check(config, source=source)
    return config


def load_router(part: str, overrides: Sequence[str] = (), source: str = "--router") -> RouterOptions:
    """A shipped router part, or the path of one, with ``router.key=value`` overrides.

    ``source``: what named the part, for messages. Raises ConfigError where it does not exist, or an override is none of
    the router's.
    """
    foreign = [text for text in overrides if not text.startswith("router.")]
    if foreign:
        raise ConfigError([Problem(foreign[0], "only options of the router can be given here: router.…=…")], part)
    try:
        found = compose("tiny", [f"parts.router={part}", *overrides])
    except ConfigError as error:
        unknown = [problem for problem in error.problems if problem.path == "parts.router"]
        if not unknown:
            raise
        # The user named no experiment: the one that the part is put into must not be blamed.
        raise ConfigError([Problem("", problem.message) for problem in unknown], f"{source} {part}") from None
    router: RouterOptions = build(RouterOptions, found["router"], path="router", source=part)
    return _with_gate_options(router, part)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested dictionaries and lists that ``from_dict`` reads back to an equal configuration."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML that ``load_run_config`` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def check(config: RunConfig, world_size: int | None = None, source: str = "configuration") -> None:
    """Checks across sections; with ``world_size``, also those that depend on the number of processes.

    Raises ConfigError with every problem found.
    """
    from moe_train.training.checks import problems

    if found := problems(config, world_size):
        raise ConfigError(found, source)


def _zero_0(data: dict[str, Any]) -> list[Problem]:
    train = data.get("train")
    stage = train.get("zero_stage") if isinstance(train, dict) else None
    if stage == 0 and not isinstance(stage, bool):
        message = "ZeRO 0 averages gradient norms of experts wrongly in DeepSpeed 0.19; use stage 1"
        return [Problem("train.zero_stage", message)]
    return []


def _with_gate_options(router: RouterOptions, source: str) -> RouterOptions:
    """The gate's own options validated by the dataclass that it registered, with its defaults filled in."""
    from moe_train.config.errors import listing, nearest
    from moe_train.routing import available_gates, gate_options

    known = list(available_gates())
    if router.gate not in known:
        guess = nearest(router.gate, known)
        hint = f"did you mean {guess}? " if guess else ""
        raise ConfigError([Problem("router.gate", f"no gate {router.gate!r}; {hint}gates: {listing(known)}")], source)
    cls = gate_options(router.gate)
    try:
        options: Any = build(cls, router.options, path="router.options", source=source)
    except ConfigError as error:
        found = list(error.problems)
        if any("unknown key" in problem.message for problem in found):
            allowed = listing(f.name for f in dataclasses.fields(cls))
            note = f"gate {router.gate!r} takes {allowed}; to change the gate with its options: parts.router=<name>"
            found.append(Problem("router.options", note))
        raise ConfigError(found, source) from None
    return dataclasses.replace(router, options=_plain(dataclasses.asdict(options)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
