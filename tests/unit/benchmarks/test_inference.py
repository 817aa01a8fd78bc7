"""The benchmark of inference at a size that takes no time: sizes of the arms are those of its definition."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
ARMS = ("experts", "active", "total")


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    run = "--preset test --batches 1 3 --prompt 8 --tokens 2 --rounds 2 --threads 1"
    command = [sys.executable, str(BENCHMARKS / "inference.py"), *run.split(), "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(output.read_text(encoding="utf-8"))
    models = found["models"]
    assert tuple(models) == ARMS
    for name in ("token_flops", "prefill_flops_per_token"):
        experts, active, total = (models[arm][name] for arm in ARMS)
        # The gate alone makes the difference: 2 layers of 2 * 64 * 8.
        assert 0 < active < experts < 1.03 * active
        # Feed-forward layers of 8 experts in place of 2: 2 layers of 2 * 3 * 64 * 32 for each.
        assert total - active == pytest.approx(6 * 2 * 2 * 3 * 64 * 32)
    experts, active, total = (models[arm]["parameters"] for arm in ARMS)
    assert experts - total == 2 * 64 * 8 and total - active == 6 * 2 * 3 * 64 * 32
    # Keys and values of 2 heads of 16 in 2 layers, float32 on a CPU and bfloat16 elsewhere.
    size = 4 if found["setting"]["device"] == "CPU" else 2
    assert {models[arm]["cache_bytes_per_token"] for arm in ARMS} == {2 * 2 * 2 * 16 * size}
    assert all(models[arm]["memory"]["peak"] > 0 for arm in ARMS)
    assert set(found["batches"]) == {"1", "3"}
    for arms in found["batches"].values():
        assert set(arms) == set(ARMS)
        for row in arms.values():
            for times in (row["prefill"], row["token"]):
                assert times["median"] > 0 and times["against_experts"]["median"] > 0
        assert arms["experts"]["token"]["against_experts"]["median"] == 1
