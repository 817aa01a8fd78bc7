"""From the hub to the hub through a run: import, train under expert parallelism from these weights, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import VOCAB, moe_train, overrides
from tests.reference import hub


@pytest.mark.slow
def test_a_run_begins_with_imported_weights(data: Path, tmp_path: Path) -> None:
    """With a learning rate of zero the export holds the imported weights; with another one transformers loads it."""
    shape = {**hub.MODELS["deepseek_v3"].config, "vocab_size": VOCAB, "eos_token_id": [2, 3]}
    hub.make(tmp_path / "hub", hub.Hub("DeepseekV3", shape), seed=5)
    (tmp_path / "hub" / "LICENSE").write_text("free")
    assert moe_train("convert", "import", tmp_path / "hub", tmp_path / "ours").returncode == 0
    for lr, run in ((0.0, "still"), (0.01, "moved")):
        options = ["train.steps=2", "train.global_batch_size=4", "train.micro_batch_size=1", "parallel.expert=2"]
        options += [f"optimizer.lr={lr}", "router.balancing.bias.rate=0.0000001", *overrides(data)]
        arguments = ["--init-from", tmp_path / "ours", "--run-dir", tmp_path / run, "--processes", "2"]
        done = moe_train("train", tmp_path / "ours" / "config.yaml", *options, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        done = moe_train("convert", "export", tmp_path / run, tmp_path / f"{run}_hub")
        assert done.returncode == 0, done.stderr
        content = json.loads((tmp_path / f"{run}_hub" / "config.json").read_text())
        # The run's own sequences have 32 tokens.
        assert content["max_position_embeddings"] == 64 and content["eos_token_id"] == [2, 3]
        assert (tmp_path / f"{run}_hub" / "LICENSE").is_file()
    want, still, moved = (hub.tensors(tmp_path / name) for name in ("hub", "still_hub", "moved_hub"))
    for name, tensor in want.items():
        if name.endswith("e_score_correction_bias"):
            # Its first move takes the mean away, which changes no selection.
            torch.testing.assert_close(still[name], tensor - tensor.mean(), rtol=0, atol=1e-6)
        else:
            assert still[name].equal(tensor), name
            assert not moved[name].equal(tensor), name
    assert hub.logits(tmp_path / "moved_hub", torch.arange(12)[None]).isfinite().all()
    done = moe_train("train", tmp_path / "ours" / "config.yaml", *overrides(data), "--resume", next(
        (tmp_path / "ours" / "checkpoints").glob("step_*")), "--run-dir", tmp_path / "other")  # fmt: skip
    assert done.returncode == 2 and "--init-from" in done.stderr
    other = [*overrides(data), "model.rope_theta=500", "--processes", "1", "--run-dir", tmp_path / "other"]
    done = moe_train("train", tmp_path / "ours" / "config.yaml", *other, "--init-from", tmp_path / "ours")
    assert done.returncode == 2 and "model.rope_theta: 10000.0 there, 500.0 now" in done.stderr
    assert not (tmp_path / "other" / "hf").exists()
    done = moe_train("train", tmp_path / "ours" / "config.yaml", *overrides(data), "--init-from", tmp_path)
    assert done.returncode == 2 and "there is no checkpoint" in done.stderr
