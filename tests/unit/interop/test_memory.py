"""Peak memory of import and export. Pitfall 23: AM#3663/PR3580/PR3610 (experts stacked in memory)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_MEASURE = """
import sys
from pathlib import Path
from moe_train.training.convert import export_model, import_model
from tests.reference import hub

def memory(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) * 1024

root = Path(sys.argv[1])
def go(part):
    import_model(root / part / "hub", root / part / "ours")
    yield
    export_model(root / part / "ours", root / part / "back", shard_bytes=300_000_000)
    yield
list(go("tiny"))
before = memory("VmRSS")
for _ in go("large"):
    print(memory("VmHWM") - before)
"""
_MAKE = """
import sys, torch
from pathlib import Path
from tests.reference import hub
torch.set_default_dtype(torch.bfloat16)
root = Path(sys.argv[1])
small = {**hub.MODELS["qwen3_moe"].config}
hub.make(root / "tiny" / "hub", hub.Hub("Qwen3Moe", small, torch.bfloat16), 0)
large = {**small, "hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 64, "num_hidden_layers": 4}
hub.make(root / "large" / "hub", hub.Hub("Qwen3Moe", large, torch.bfloat16, "300MB"), 0)
"""


def script(text: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", text, str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_never_more_than_a_shard_lies_in_memory(tmp_path: Path) -> None:
    """Layers of 64 experts of 1.5 MB each: one layer's experts stacked would be 100 MB, the model is 400 MB."""
    script(_MAKE, tmp_path)
    largest = max(path.stat().st_size for path in (tmp_path / "large" / "hub").glob("*.safetensors"))
    assert largest >= 256 * 2**20
    peaks = [int(line) for line in script(_MEASURE, tmp_path).split()]
    print(f"shard {largest}, peaks above the imports {peaks}")
    assert max(peaks) <= 1.3 * largest
    assert max(peaks) < 100 * 10**6  # and no layer's experts either
