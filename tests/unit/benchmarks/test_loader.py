"""The loader's benchmark at a small size: it compares the same windows and reports every arm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    arguments = ["--tokens", "30000", "--sequence-length", "64", "--batches", "1x1", "3x5", "--block", "50"]
    output = tmp_path / "result.json"
    result = subprocess.run(
        [sys.executable, BENCHMARKS / "loader.py", *arguments, "--rounds", "2", "--output", output],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(output.read_text())
    assert found["windows"] >= 30_000 // 64 - 1
    assert set(found["arms"]) == {"megatron-core", "moe_train, 1 x 1", "moe_train, 3 x 5"}
    assert all(arm["samples_per_cpu_second"]["median"] > 0 for arm in found["arms"].values())
