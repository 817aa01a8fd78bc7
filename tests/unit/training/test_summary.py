"""What --dry-run says about each kind of model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_train.training.account import multi_token_parameters, parameters
from moe_train.training.run_config import load_run_config
from moe_train.training.summary import summary


def said(model: str, *overrides: str) -> str:
    config = load_run_config("tiny", [f"parts.model={model}", *overrides])
    return summary(config, 1, Path("runs/x"), "cpu")


def test_deepseek_v3_shows_all_of_its_kinds() -> None:
    text = said("deepseek_v3")
    for part in (
        "deepseek_v3: 61 layers of hidden size 7,168: 3 dense of width 18,432, 58 with 256 experts of width 2,048 and "
        "a shared one of 2,048",
        "latent attention of 128 heads of 128 + 64, values of 128; queries through 1536, keys and values through 512",
        "671,026,404,352 in total",
        "and 11,610,067,968 of the layer of multi-token prediction, not counted",
        "active parameters and multi-token prediction",
        "dense layers 1,189,085,184",
        "shared experts 2,554,331,136",
    ):
        assert part in text
    config = load_run_config("tiny", ["parts.model=deepseek_v3", "model.multi_token.layers=0"])
    assert multi_token_parameters(config).total == 0
    assert "multi-token" not in summary(config, 1, Path("runs/x"), "cpu")
    direct = said("deepseek_v3", "model.latent_attention.query_rank=null")
    assert "queries through" not in direct and "keys and values through 512" in direct


@pytest.mark.parametrize("model", ["qwen3_0.6b", "llama3_8b", "moe_router_dense_total"])
def test_dense_families_say_nothing_about_experts(model: str) -> None:
    text = said(model)
    assert "all dense of width" in text and "all of them active" in text
    assert not re.search(r"expert|gate|EP |latent|multi-token|shared", text)
    assert ("head 0" in text, ", head" in text) == (False, model != "qwen3_0.6b")


def test_kinds_add_up() -> None:
    for model in ("qwen3_moe_17m", "lpr_deepseek_v3_0.6b", "qwen3_0.6b"):
        config = load_run_config("tiny", [f"parts.model={model}"])
        [line] = [line for line in summary(config, 1, Path("runs/x"), "cpu").splitlines() if " embedding " in line]
        figures = [int(figure.replace(",", "")) for figure in re.findall(r" ([\d,]*\d)(?:,|$)", line)]
        assert sum(figures) == parameters(config).total, line


def test_buffers_of_the_engine_are_said() -> None:
    """They have their full size however small the model is."""
    assert "DeepSpeed's buffers, at most 1.9 GiB" in said("qwen3_moe_17m")
    small = "deepspeed.zero_optimization.reduce_bucket_size=1000"
    assert "DeepSpeed's buffers, at most 7.8 KiB" in said("qwen3_moe_17m", small)


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_the_copy_for_background_saves(offload: str) -> None:
    """12 bytes per parameter of the rank's share, also where nothing is offloaded."""
    counted = parameters(load_run_config("tiny"))
    size = 12 * (counted.total + counted.vocab_padding) / 2**20
    text = said("tiny", f"train.offload_optimizer={offload}")
    assert f"and {size:.1f} MiB of host memory for the copy that is saved in the background" in text
    assert "the copy that" not in said("tiny", "checkpoint.asynchronous=false")


def test_the_worst_case_of_routing_and_what_bounds_it() -> None:
    def said_by(*overrides: str, processes: int = 2) -> str:
        return summary(load_run_config("tiny", overrides), processes, Path("runs/x"), "cpu")

    assert "at worst" not in said_by(processes=1)
    spread = said_by("parallel.expert=2")
    assert "more, where all tokens choose the experts of one rank; a capacity (router.capacity.factor)" in spread
    assert "router.capacity.factor is 1.25" in said_by("parallel.expert=2", "router.capacity.factor=1.25")
    padded = ("parallel.expert=2", "router.capacity.factor=1.25", "router.capacity.pad=true")
    assert "at worst" not in said_by(*padded), "as many rows as always"
