"""Ranks that are killed at random moments: nothing is lost (pitfall 24: AM PR3261, lightning#688)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def campaign(folder: Path, *arguments: object) -> dict[str, object]:
    output = folder / "faults.json"
    line = [sys.executable, ROOT / "benchmarks" / "faults.py", "--output", output, *arguments]
    result = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=1800)
    assert output.exists(), result.stderr[-3000:]
    found: dict[str, object] = json.loads(output.read_text())
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{json.dumps(found['options'])}"
    return found


def test_five_kills(tmp_path: Path) -> None:
    """Every run finishes with the bits of one that was left alone, and whatever `latest` named could be read. With
    torchrun, which starts the workers again without starting itself again: a quarter of the time."""
    found = campaign(tmp_path, "--kills", 5, "--kills-per-run", 5, "--steps", 250, "--launcher", "torchrun")
    assert found["kills"] == 5 and found["runs_bit_equal"] == found["runs_total"] == 1
    assert found["checkpoints_damaged"] == 0 and int(str(found["checkpoints_verified"])) > 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--launcher", "deepspeed"], ["--zero-stage", "3"]], ids=["our restarts", "zero 3"]
)
def test_other_ways(tmp_path: Path, arguments: list[str]) -> None:
    campaign(tmp_path, "--kills", 4, "--kills-per-run", 4, "--steps", 150, *arguments)
