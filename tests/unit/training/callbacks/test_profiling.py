from __future__ import annotations

import json
from pathlib import Path

import torch

from moe_train.training.callbacks.profiling import StepHook, profile_hook
from moe_train.training.options import ProfileOptions


def run(hook: StepHook, steps: range) -> None:
    for step in steps:
        hook.start_step(step)
        torch.ones(4, 4) @ torch.ones(4, 4)
        hook.end_step(step)
    hook.close()


def test_window_writes_trace_and_summary(tmp_path: Path) -> None:
    run(profile_hook(ProfileOptions(start_step=2, steps=2, memory=True), tmp_path), range(1, 6))
    trace = json.loads((tmp_path / "profile" / "trace_2_3.json").read_text())
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == 2, "two steps, no more"
    assert "aten::mm" in (tmp_path / "profile" / "summary_2_3.txt").read_text()


def test_a_run_that_ends_inside_the_window_keeps_what_there_is(tmp_path: Path) -> None:
    run(profile_hook(ProfileOptions(start_step=2, steps=100), tmp_path), range(1, 4))
    assert (tmp_path / "profile" / "trace_2_3.json").is_file()


def test_off_by_default_and_on_other_ranks(tmp_path: Path) -> None:
    run(profile_hook(ProfileOptions(), tmp_path), range(1, 4))
    run(profile_hook(ProfileOptions(start_step=1), tmp_path, rank=1), range(1, 4))
    assert not (tmp_path / "profile").exists()
