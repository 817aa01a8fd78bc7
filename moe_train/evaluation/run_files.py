"""Reads what a run has left in its folder. Every part may be missing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_train.data.options import label_of
from moe_train.evaluation.result import read_evaluation

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    run_dir: Path
    train: list[Record] = field(default_factory=list)
    """Records of kind "train", by step."""
    validation: list[Record] = field(default_factory=list)
    """Records of kind "eval", by step."""
    alarms: list[Record] = field(default_factory=list)
    """Records of kind "alarm", by step."""
    guard: list[Record] = field(default_factory=list)
    """Records of kind "guard", by step."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Results of ``moe-train evaluate`` by name; that of the run's own validation set first."""
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.run_dir.resolve().name)

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The evaluation that the summary is about."""
        return next(iter(self.evaluations.values()), None)

    def option(self, path: str) -> Any:
        """A value of the configuration by dotted path, None where there is none."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_run(run_dir: Path) -> RunFiles:
    """ValueError when the folder does not exist or holds neither metrics nor a configuration nor an evaluation."""
    if not run_dir.is_dir():
        raise ValueError(f"there is no run folder {run_dir}")
    warnings: list[str] = []
    records = _read_records(run_dir / "metrics.jsonl", warnings)
    config_text, config = _read_config(run_dir / "config.yaml", warnings)
    evaluations = _read_evaluations(
        run_dir / "evaluation", label_of((config.get("data") or {}).get("validation")), warnings
    )
    if not records and not config and not evaluations:
        raise ValueError(
            f"{run_dir} is not a run folder: no metrics.jsonl, no config.yaml and no evaluation that can be read"
        )
    return RunFiles(
        run_dir=run_dir,
        train=[record for record in records if record.get("kind") == "train"],
        validation=[record for record in records if record.get("kind") == "eval"],
        alarms=[record for record in records if record.get("kind") == "alarm"],
        guard=[record for record in records if record.get("kind") == "guard"],
        evaluations=evaluations,
        config=config,
        config_text=config_text,
        environment=_read_json_object(run_dir / "environment.json", warnings),
        warnings=warnings,
    )


def _read_records(path: Path, warnings: list[str]) -> list[Record]:
    if not path.is_file():
        return []
    records: list[Record] = []
    bad = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            bad += 1
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            bad += 1
    if bad:
        warnings.append(f"{bad} lines of {path.name} are no records and were left out")
    return sorted(records, key=lambda record: record["step"])


def _read_config(path: Path, warnings: list[str]) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        return "", {}
    import yaml

    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        warnings.append(f"{path.name} cannot be read: {error}")
        return text, {}
    return text, config if isinstance(config, dict) else {}


def _read_evaluations(folder: Path, validation: str, warnings: list[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = read_evaluation(path)
        except (OSError, ValueError) as error:
            warnings.append(str(error))

    def order(item: tuple[str, dict[str, Any]]) -> tuple[bool, int, str]:
        name, evaluation = item
        return str(evaluation.get("data")) != validation, -(evaluation.get("step") or 0), name

    return dict(sorted(found.items(), key=order))


def _read_json_object(path: Path, warnings: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        warnings.append(f"{path.name} cannot be read: {error}")
        return {}
    return content if isinstance(content, dict) else {}
