"""The benchmark's weights and its command, at a size that takes no time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_query_key_and_value_are_taken_apart_per_group() -> None:
    from geometry import Geometry
    from peer import _split_qkv

    geometry = Geometry(heads=4, kv_heads=2, head_dim=3, hidden=5)
    query, key, value = torch.randn(4, 3, 5), torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    groups = [torch.cat([query[2 * g : 2 * g + 2], key[g : g + 1], value[g : g + 1]]) for g in range(2)]
    q, k, v = _split_qkv(torch.cat(groups).view(-1, 5), geometry)
    assert torch.equal(q.view(4, 3, 5), query)
    assert torch.equal(k.view(2, 3, 5), key)
    assert torch.equal(v.view(2, 3, 5), value)


def test_different_losses_are_refused() -> None:
    from arms import check_equal

    check_equal({"a": 9.0, "b": 9.00001})
    for other in (9.001, float("nan")):
        with pytest.raises(SystemExit, match="same loss"):
            check_equal({"a": 9.0, "b": other})


@pytest.mark.slow
def test_the_command_compares_all_arms(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5")
    output = tmp_path / "result.json"
    sizes = "--layers 2 --hidden 32 --heads 4 --kv-heads 2 --head-dim 8 --expert-ffn 16 --experts 8 --top-k 2"
    run = "--vocab 96 --sequence 16 --batch 2 --steps 2 --warmup 1 --threads 1 --no-memory --breakdown"
    command = [sys.executable, str(BENCHMARKS / "train_step.py"), *sizes.split(), *run.split(), "--output", str(output)]
    subprocess.run(command, check=True, timeout=300)
    document = json.loads(output.read_text(encoding="utf-8"))
    assert document["setting"]["packages"]["torch"]
    for balance in ("learned", "forced"):
        result = document["results"][balance]
        assert set(result["arms"]) == {"engine", "model", "hf_grouped", "hf_eager"}
        assert max(result["loss_before"].values()) - min(result["loss_before"].values()) < 1e-4
        parts = result["breakdown"]["engine"]
        assert 0.5 < sum(part["share"] for part in parts.values()) < 1.5
