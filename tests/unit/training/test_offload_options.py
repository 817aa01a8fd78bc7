"""What is refused about offload, and what --dry-run says."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.config.errors import ConfigError
from moe_train.training.run_config import load_run_config
from moe_train.training.summary import summary

ZERO = "deepspeed.zero_optimization"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["train.offload_optimizer=nvme"], "train.offload_optimizer"),
        ([f"{ZERO}.offload_optimizer.device=cpu"], "use train.offload_optimizer"),
        ([f"{ZERO}.cpu_offload=true"], "use train.offload_optimizer"),
        ([f"{ZERO}.offload_param.device=cpu"], "parameters stay on the device"),
        (["deepspeed.zero_force_ds_cpu_optimizer=true"], "use optimizer.name and train.offload_optimizer"),
        (["train.offload_optimizer=cpu", "parallel.tensor=2"], "together with tensor parallelism is not tested"),
    ],
)
def test_refused(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_run_config("tiny", overrides)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_dry_run_says_where_the_optimizer_lies(stage: int) -> None:
    config = load_run_config("tiny", ["train.offload_optimizer=cpu", f"train.zero_stage={stage}"])
    text = summary(config, 2, Path("runs/x"), "cpu")
    assert "of host memory for the offloaded optimizer" in text and "optimizer 0 B" in text
    assert "offloaded" not in summary(load_run_config("tiny"), 2, Path("runs/x"), "cpu")
