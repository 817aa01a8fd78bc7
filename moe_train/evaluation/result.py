"""The result of an evaluation and its JSON form (docs/evaluation.md), which is stable."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_train.data.dataset import sidecar_stem
from moe_train.routing.statistics import spread


@dataclass(frozen=True)
class LayerResult:
    """Expert load of one MoE layer, numbered from 0 among all layers."""

    layer: int
    statistics: dict[str, float]
    """moe_train.routing.statistics.balance_statistics."""
    gini_floor: float
    """Gini that perfectly even random routing of as many slots would show."""
    load: list[int]
    """Exact slots per expert before capacity, padding excluded."""
    kept: list[int]
    """The same after capacity."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further facts by their keys in the JSON form (moe_train.evaluation.routing_details)."""

    def numbers(self) -> dict[str, float]:
        """Everything that is one number, and so can be averaged over layers."""
        more = {name: value for name, value in self.more.items() if isinstance(value, float)}
        return {**self.statistics, "gini_floor": self.gini_floor, **more}


@dataclass(frozen=True)
class DomainResult:
    loss: float | None
    """Nats per target token; None for a domain without one."""
    tokens: int
    bytes: int | None
    bits_per_byte: float | None
    load: list[list[int]]
    """Per MoE layer, slots per expert."""


@dataclass(frozen=True)
class EvaluationResult:
    loss: float
    """Nats per target token, without any auxiliary term."""
    tokens: int
    """Target tokens."""
    bytes: int | None
    bits_per_byte: float | None
    routed_tokens: int
    """Non-padding input tokens."""
    layers: list[LayerResult]
    domains: dict[str, DomainResult] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def mean(self) -> dict[str, float]:
        """Each statistic that every layer has, averaged over the layers."""
        return {name: sum(values) / len(values) for name, values in self._columns().items()}

    def over_layers(self) -> dict[str, dict[str, float]]:
        """Minimum, quartiles and maximum over the layers of each statistic that every layer has."""
        return {name: spread(values) for name, values in self._columns().items()}

    def _columns(self) -> dict[str, list[float]]:
        rows = [layer.numbers() for layer in self.layers]
        return {name: [row[name] for row in rows] for name in (rows or [{}])[0] if all(name in row for row in rows)}

    def to_json(
        self, *, step: int | None = None, data: str | None = None, unigram_entropy: float | None = None
    ) -> dict[str, Any]:
        """``unigram_entropy`` in nats per token, of the same tokens (the manifest of the data knows it)."""
        return {
            "step": step,
            "data": data,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "routed_tokens": self.routed_tokens,
            "unigram_entropy": unigram_entropy,
            "layers": [
                {
                    "layer": layer.layer,
                    **layer.statistics,
                    "gini_floor": layer.gini_floor,
                    "load": layer.load,
                    "kept": layer.kept,
                    **layer.more,
                }
                for layer in self.layers
            ],
            "mean": self.mean(),
            "over_layers": self.over_layers(),
            "domains": {
                name: {
                    "loss": domain.loss,
                    "tokens": domain.tokens,
                    "bytes": domain.bytes,
                    "bits_per_byte": domain.bits_per_byte,
                    "load": domain.load,
                }
                for name, domain in self.domains.items()
            },
        }


def evaluation_path(run_dir: Path, data: str, checkpoint: str = "latest", kind: str = "") -> Path:
    """Where a result goes: <run>/evaluation/<name of the data><kind>[-<checkpoint>].json.

    data: what the result will say under "data". The name is the last part of its path; where that file holds the result
    of another data set, as many parts before it are added as make the names differ: a/validation goes to
    validation.json, b/validation then to b-validation.json. The same data set keeps its file.
    """
    end = kind
    if checkpoint != "latest":
        end += "-" + (f"step_{int(checkpoint):08d}" if checkpoint.isdigit() else Path(checkpoint).name)
    stem = Path(sidecar_stem(data))
    # Of several data sets.
    parts = ["validation"] if " + " in data or not stem.name else [*_folders(stem), stem.name]
    names = ["-".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    # More than one blend, or names that are alike when they are joined: by number.
    numbered = (f"{names[-1]}-{number}" for number in itertools.count(2))
    free: Path | None = None
    for count, name in enumerate(itertools.chain(names, numbered)):
        path = run_dir / "evaluation" / f"{name}{end}.json"
        held = _data_of(path)
        if held is not None and _same_names(held) == _same_names(data):
            return path
        if held is None:
            free = free or path
            if count >= len(names) - 1:
                return free
    raise AssertionError("numbers do not end")


def _folders(stem: Path) -> list[str]:
    return [part for part in Path(os.path.abspath(stem)).parent.parts if part != os.sep]


def _data_of(path: Path) -> str | None:
    """Which data the result in a file is of; None where there is no result, which may be written then."""
    try:
        return str(read_evaluation(path).get("data"))
    except (OSError, ValueError):
        return None


def _same_names(label: str) -> list[str]:
    """The data sets of a label by their files, however they are named."""
    return [os.path.realpath(sidecar_stem(name)) for name in label.split(" + ")]


def write_evaluation(path: Path, evaluation: Mapping[str, Any]) -> None:
    """Writes the JSON object so that a reader sees the old file or the whole new one. NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(_finite(evaluation), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_evaluation(path: Path) -> dict[str, Any]:
    """ValueError when the file is no evaluation."""
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(evaluation, dict) or "loss" not in evaluation or "layers" not in evaluation:
        raise ValueError(f"{path} is not the result of an evaluation: it has no loss or no layers")
    return evaluation


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
