"""The experiment file of ``moe-train compare``: arms, seeds, a budget and how it is evaluated (docs/compare.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_train.config.compose import EXPERIMENTS, comparisons, shipped_configs
from moe_train.config.errors import ConfigError, Problem, listing, nearest
from moe_train.config.validate import build

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
OWN_FILES = ("experiment.yaml", "figures", "report.html", "table.json", "table.md")
"""What stands beside the arms in the folder of a comparison."""
RESERVED = {"seed": "seeds", "name": "the name of the arm", "train.steps": "budget"}
"""Keys of a run's configuration that an experiment sets itself, and from what."""


@dataclass(frozen=True)
class Budget:
    """How long each arm trains; one of both."""

    steps: int | None = None
    tokens: int | None = None
    """Tokens of training (positions: padding of ``sampler: documents`` counts); rounded up to whole steps."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give either steps or tokens")
        if (self.steps or self.tokens or 0) < 1:
            raise ValueError(f"must be at least 1, got {self.steps or self.tokens}")

    def steps_of(self, tokens_per_step: int) -> int:
        return self.steps or -(-(self.tokens or 0) // tokens_per_step)


@dataclass(frozen=True)
class EvaluationProtocol:
    """As ``moe-train evaluate`` has them."""

    data: str = ""
    """Prepared data; empty for the run's validation data."""
    documents: bool = False
    """Documents one by one, cut and padded, in place of windows of the text."""
    max_length: int = 512
    """With documents: cut at so many tokens."""
    batch_documents: int = 25
    limit_batches: int | None = None
    """Only so many batches per process, spread evenly over the data."""

    def arguments(self) -> list[str]:
        """Those of the worker ``moe_train.training.evaluate``."""
        line = ["--data", self.data] if self.data else []
        if self.limit_batches is not None:
            line += ["--limit-batches", str(self.limit_batches)]
        if self.documents:
            line += ["--documents", "--max-length", str(self.max_length)]
            line += ["--batch-documents", str(self.batch_documents)]
        return line


@dataclass(frozen=True)
class Experiment:
    base: str
    """The experiment of one run that all arms are changes of: a shipped name or the path of a file."""
    arms: dict[str, dict[str, Any]]
    """Name of each arm -> what it changes, as in a configuration or with dotted keys (``parts.router: lpr``)."""
    budget: Budget
    seeds: list[int] = field(default_factory=lambda: [1])
    title: str = ""
    """Heading of the tables; empty for the name of the file."""
    labels: dict[str, str] = field(default_factory=dict)
    """What the tables call an arm, where that is not its name."""
    baseline: str = ""
    """The arm that the others are compared with; empty for the first."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Changes of the base that all arms share."""
    evaluation: EvaluationProtocol = field(default_factory=EvaluationProtocol)

    def label(self, arm: str) -> str:
        return self.labels.get(arm, arm)

    @property
    def compared_with(self) -> str:
        return self.baseline or next(iter(self.arms))


def load_experiment(name_or_path: str) -> tuple[str, Path, Experiment]:
    """Name, path and content of an experiment file.

    ``ConfigError`` with every problem that shows without building the arms, ``ValueError`` where there is no such file.
    """
    path = find_comparison(name_or_path)
    data = _read(path)
    experiment = build(Experiment, data, source=str(path))
    if found := list(_problems(experiment)):
        raise ConfigError(found, str(path))
    return path.stem, path, experiment


def find_comparison(name_or_path: str) -> Path:
    """A path that exists, or else the shipped comparison of that name; ValueError lists what there is."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = comparisons()
    if name_or_path in known:
        return shipped_configs() / EXPERIMENTS / f"{name_or_path}.yaml"
    guess = nearest(name_or_path, known)
    hint = f"Did you mean {guess}? " if guess else ""
    raise ValueError(
        f"no comparison {name_or_path!r}: it is neither a file nor a shipped one. {hint}Shipped: {listing(known)}"
    )


def dotted(changes: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested changes as the overrides ``key=value`` of the command line, which are parsed as YAML again."""
    found: list[str] = []
    for key, value in changes.items():
        where = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found += dotted(value, f"{where}.")
        else:
            found.append(f"{where}={json.dumps(value, ensure_ascii=False)}")
    return found


def reserved(overrides: list[str], place: str) -> Iterator[Problem]:
    """A problem for each override of what the experiment sets itself."""
    for override in overrides:
        key = override.split("=", 1)[0]
        if key in RESERVED:
            yield Problem(f"{place}{key}", f"cannot be changed here: it follows from {RESERVED[key]}")


def _read(path: Path) -> Any:
    """Plain values. OmegaConf reads them as in every configuration: 1e-3 is a number, a key given twice an error."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError([Problem("", f"no valid YAML: {error}")], str(path)) from None


def _problems(experiment: Experiment) -> Iterator[Problem]:
    if not experiment.arms:
        yield Problem("arms", "there is none; an arm is written `name: {parts.router: lpr}`")
    for name, changes in experiment.arms.items():
        if not _NAME.fullmatch(name):
            yield Problem(f"arms.{name}", "names a folder: letters, digits and _ . + - only")
        if name in OWN_FILES:
            yield Problem(f"arms.{name}", "is the name of a file of the comparison itself: choose another one")
        yield from reserved(dotted(changes), f"arms.{name}.")
    yield from reserved(dotted(experiment.overrides), "overrides.")
    for name in experiment.labels:
        if name not in experiment.arms:
            yield Problem(f"labels.{name}", f"no such arm; arms: {listing(experiment.arms)}")
    if experiment.baseline and experiment.baseline not in experiment.arms:
        yield Problem("baseline", f"no arm {experiment.baseline!r}; arms: {listing(experiment.arms)}")
    if not experiment.seeds or len(set(experiment.seeds)) < len(experiment.seeds) or min(experiment.seeds) < 0:
        yield Problem("seeds", f"must be different whole numbers of at least 0, got {experiment.seeds}")
    protocol = experiment.evaluation
    for key in ("max_length", "batch_documents", "limit_batches"):
        value = getattr(protocol, key)
        if value is not None and value < 1:
            yield Problem(f"evaluation.{key}", f"must be at least 1, got {value}")
