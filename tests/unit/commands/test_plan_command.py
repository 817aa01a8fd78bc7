"""``moe-train plan``: what it prints, its exit codes, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moe_train import cli

ROOT = Path(__file__).parents[3]
MACHINE = ["--gpus", "8", "--memory", "80"]


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pinned = ["train.global_batch_size=64", "parallel.expert=2", "parallel.tensor=1"]
    assert cli.main(["plan", "demo", *pinned, *MACHINE, "--show", "3"]) == 0
    text = capsys.readouterr().out
    assert "17,467,904 parameters" in text and "3 of 12 layouts that fit, shortest step first" in text
    for part in ("optimizer", "logits", "bucket of gradients", "gradients (experts)", "expert rows", "all_to_all"):
        assert part in text
    assert "host memory: copy for background saves" in text
    [best] = re.findall("best: moe-train train (.*)", text)
    assert "parallel.expert=2" in best and best.count("parallel.expert") == 1 and best.endswith("--processes 8")
    assert list(tmp_path.iterdir()) == []


def test_the_best_command_is_one_that_train_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "demo", "train.global_batch_size=64", *MACHINE]) == 0
    [best] = re.findall("best: moe-train (.*)", capsys.readouterr().out)
    assert cli.main([*best.split(), "--dry-run"]) == 0


def test_json_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "demo", "train.global_batch_size=64", *MACHINE, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    best = result["layouts"][0]
    assert best["seconds"]["total"] > 0 and 0 < best["mfu"] < 1
    assert best["memory"]["need"] <= 80 * 0.9 * 2**30
    kinds = {"parameters", "gradients", "optimizer", "activations", "logits", "buffer_bucket", "host", "host_save_copy"}
    assert kinds <= set(best["memory"])
    assert all(item["sent"] > 0 for item in best["sent"])
    assert result["hardware"]["network_bandwidth"] == 40 and result["would_help"] == []


def test_a_batch_that_is_too_small_for_the_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped configurations have batches for few GPUs."""
    assert cli.main(["plan", "qwen3_30b_a3b", "--gpus", "64", "--memory", "80"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("planned with train.global_batch_size=64: 64 GPUs cannot share 4\n")
    [best] = re.findall("best: moe-train (.*)", text)
    assert "train.global_batch_size=64" in best.split()
    assert cli.main(["plan", "qwen3_30b_a3b", "--gpus", "64", "--memory", "80", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["global_batch_size"] == 64
    pinned = ["train.global_batch_size=4", "--gpus", "64", "--memory", "80"]
    assert cli.main(["plan", "qwen3_30b_a3b", *pinned]) == 1
    assert "What would help:\n  train.global_batch_size=64\n" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "moe_train/cli.py"])
def test_examples_find_layouts(page: str) -> None:
    [example] = re.findall(r"moe-train (plan [^`\"]*--memory \d+)", (ROOT / page).read_text())
    assert cli.main(example.split()) == 0


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "mixtral_8x7b", "train.global_batch_size=64", "--gpus", "2", "--memory", "16"]) == 1
    text = capsys.readouterr().out
    assert "No layout fits. What would help:" in text and "  --gpus " in text and "does not fit:" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["demo", "--gpus", "0", "--memory", "80"], "--gpus must be at least 1"),
        (["demo", "--gpus", "8", "--memory", "-1"], "memory must be"),
        (["demo", "--gpus", "12", "--memory", "80"], "no whole number of nodes"),
        (["nothing", *MACHINE], "Shipped experiments"),
        (["demo", "parallel.pipeline=2", *MACHINE], "pipeline parallelism is not supported yet"),
        (["demo", "train.stps=3", *MACHINE], "did you mean train.steps?"),
        (["demo", *MACHINE, "--device", "Abacus"], "no data sheet"),
        (["demo", *MACHINE, "--device", "NVIDIA H200", "--peak", "5"], "both say the peak"),
        (["demo", *MACHINE, "--efficiency", "2"], "efficiency"),
        (["demo", *MACHINE, "--show", "0"], "--show"),
    ],
)
def test_nonsense(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    assert cli.main(["plan", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_too_few_sequences_for_the_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "demo", "train.global_batch_size=4", "parallel.tensor=1", *MACHINE]) == 1
    text = capsys.readouterr().out
    assert "4 is not divisible by train.micro_batch_size (1) x data-parallel ranks (8)" in text


def test_tensor_parallelism_is_a_way_out_of_too_few_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    """Its ranks read the same samples."""
    assert cli.main(["plan", "demo", "train.global_batch_size=4", *MACHINE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layouts"][0]["layout"]["tensor"] == 2


def test_a_data_sheet(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "demo", "train.global_batch_size=64", *MACHINE, "--device", "NVIDIA A40"]) == 0
    assert "149.7 TFLOP/s x 0.4" in capsys.readouterr().out
