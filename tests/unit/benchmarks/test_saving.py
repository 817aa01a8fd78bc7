"""The benchmark of saving, at a size that says nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.mark.parametrize("processes", [1, 2])
def test_each_arm_saves_what_it_says(tmp_path: Path, processes: int) -> None:
    output, folder = tmp_path / "saving.json", tmp_path / "saved"
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command = [*start, BENCHMARKS / "saving.py", "--preset", "test", "--rounds", "2", "--warmup", "0"]
    command += ["--steps", "2", "--folder", folder, "--output", output]
    result = subprocess.run(list(map(str, command)), check=True, timeout=300, capture_output=True, text=True)
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["world_size"] == processes and found["checkpoint_bytes"] > 0
    assert len(found["rounds"]) == found["rounds_measured"] == 2
    for round_ in found["rounds"]:
        assert set(round_["none"]) == {"round"}
        for name in ("at once", "in the background"):
            assert 0 < round_[name]["stall"] <= round_[name]["in_place"] <= round_[name]["round"]
    # Each arm's newest checkpoint is that of its last round; the one that does not save is not there.
    assert sorted(path.name for path in folder.iterdir()) == ["at once", "in the background"]
    assert "| in the background |" in result.stdout
