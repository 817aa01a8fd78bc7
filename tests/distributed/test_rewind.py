"""Whole runs whose numbers go bad: through the trainer, with its checkpoints and records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.checkpoint.state import read_state
from moe_train.data.indexed import IndexedWriter
from moe_train.data.provenance import trace
from moe_train.training.run_config import load_run_config
from moe_train.training.step_samples import open_samples, samples_of_step
from tests.distributed.harness import guarding
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.guarding import Trouble
from tests.e2e.checkpoints import records, tensors

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("tokens") / "train"
    generator = torch.Generator().manual_seed(3)
    with IndexedWriter(prefix, 64) as writer:
        for _ in range(60):
            writer.add(torch.randint(0, 64, (40,), generator=generator).numpy())
    return prefix


def overrides(data: Path, *more: str) -> list[str]:
    return [
        f"data.train={data}",
        f"data.validation={data}",
        "data.sequence_length=16",
        "model.vocab_size=64",
        f"train.steps={STEPS}",
        "train.global_batch_size=4",
        "train.micro_batch_size=1",
        "checkpoint.every_steps=3",
        "checkpoint.keep=9",
        "eval.every=0",
        "logging.every=1",
        "logging.tensorboard=false",
        "router.balancing.bias.rate=0.01",
        *more,
    ]


def run(processes: Processes, folder: Path, arguments: list[str], trouble: Trouble, **more: Any) -> list[str]:
    size = 1 if "parallel.expert=1" in arguments else 2
    return processes(size).run(
        guarding.whole_run, run_dir=str(folder), overrides=arguments, trouble=trouble, timeout=600, **more
    )


def guard(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder) if record["kind"] == "guard"]


def assert_same_end(one: Path, other: Path) -> None:
    ends = [folder / "checkpoints" / f"step_{STEPS:08d}" for folder in (one, other)]
    got, want = map(tensors, ends)
    assert got.keys() == want.keys() and len(want) > 20
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    states = [read_state(end) for end in ends]
    for key in ("tokens", "optimizer_steps", "consumed_samples"):
        assert states[0][key] == states[1][key]
    assert states[0]["guard"]["losses"] == states[1]["guard"]["losses"]


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_rewind_forgets_the_data(processes: Processes, data: Path, tmp_path: Path, zero: int) -> None:
    """The run is, bit for bit, one that never saw that data; also when it dies after the rewind and goes on from the
    checkpoint before, and when it is stopped and goes on."""
    layout = ["parallel.expert=2", f"train.zero_stage={zero}"]
    options = overrides(data, *layout, "guard.non_finite=rewind", "guard.rewind_steps=1")
    names = ("never", "rewound", "died", "stopped")
    never, rewound, died, stopped = (tmp_path / name for name in names)
    assert run(processes, never, options, Trouble(left_out=[4, 5])) == ["", ""]
    assert run(processes, rewound, options, Trouble(bad=[5])) == ["", ""]
    assert_same_end(rewound, never)
    found = records(rewound)
    assert [record["step"] for record in found if record["kind"] == "train"] == [1, 2, 3, 6, 7, 8]
    back, out = guard(rewound)
    assert (back["step"], back["bad_step"], back["action"], back["cause"]) == (3, 5, "rewind", "gradient")
    assert back["first_left_out"] == 4 and "back to step 3" in back["message"]
    assert (out["step"], out["action"]) == (4, "leave_out")
    assert read_state(rewound / "checkpoints" / "step_00000006")["guard"]["rewinds"] == [
        {"bad_step": 5, "to_step": 3, "first": 4, "cause": "gradient"}
    ]
    losses = [[r["loss"] for r in records(folder) if r["kind"] == "train"] for folder in (rewound, never)]
    assert losses[0] == losses[1]

    assert run(processes, died, options, Trouble(bad=[5], die=6)) == ["InterruptedError: died"] * 2
    assert run(processes, died, options, Trouble(), resume="auto") == ["", ""]
    assert_same_end(died, never)
    assert run(processes, stopped, options, Trouble(bad=[5], stop=7)) == ["", ""]
    (stopped / "rewinds.json").unlink()  # the checkpoint knows it as well
    assert run(processes, stopped, options, Trouble(), resume="auto") == ["", ""]
    assert_same_end(stopped, never)


def test_a_stop_names_what_was_read(processes: Processes, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = overrides(data, "parallel.expert=2", "guard.non_finite=stop")
    for message in run(processes, folder, options, Trouble(bad=[5])):
        assert message.startswith("BadNumbers: step 5: a gradient is not finite (the loss is ")
        assert "final_layernorm.weight" in message and "checkpoint is untouched" in message
    (record,) = guard(folder)
    assert (record["step"], record["action"], record["cause"]) == (5, "stop", "gradient")
    assert "decoder.final_layernorm.weight" in record["parameters"] and record["samples"] == [16, 19]
    read = samples_of_step(folder, 4)
    with open_samples(folder, read) as samples:
        pieces = [piece for index in range(16, 20) for piece in trace(samples, index).pieces]
    assert record["documents"] == {str(data): sorted({piece.document for piece in pieces})}
    assert sorted(path.name for path in (folder / "checkpoints").glob("step_*")) == ["step_00000003"]
    assert load_run_config(folder / "config.yaml").guard.non_finite == "stop"


def test_a_rewind_needs_a_checkpoint(processes: Processes, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = overrides(data, "parallel.expert=1", "guard.non_finite=rewind")
    (message,) = run(processes, folder, options, Trouble(bad=[2]))
    assert "no checkpoint to go back to yet" in message
    assert [(record["step"], record["action"]) for record in guard(folder)] == [(2, "stop")]


def test_skips_are_bounded_and_resumed(processes: Processes, data: Path, tmp_path: Path) -> None:
    """Two skips in a row are allowed; what is remembered of them goes through a checkpoint."""
    options = overrides(data, "parallel.expert=1", "guard.max_in_a_row=2", "guard.window=4")
    bad = Trouble(bad=[2, 3, 5, 6, 7])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    (message,) = run(processes, whole, options, bad)
    assert "step 7: " in message and "guard.max_in_a_row = 2 steps in a row were skipped already" in message
    assert [(r["step"], r["action"]) for r in guard(whole)] == [
        *((2, "skip"), (3, "skip"), (5, "skip"), (6, "skip"), (7, "stop"))
    ]
    state = read_state(whole / "checkpoints" / "step_00000006")
    assert state["optimizer_steps"] == 2 and state["guard"]["skipped"] == 4 and state["guard"]["in_a_row"] == 2
    assert len(state["guard"]["losses"]) == 2
    (message,) = run(processes, whole, options, Trouble(bad=[7]), resume="auto")
    assert "step 7: " in message and "in a row" in message
    assert run(processes, parts, options, Trouble(bad=[2, 3, 5, 6], stop=5)) == [""]
    assert run(processes, parts, options, Trouble(bad=[6]), resume="auto") == [""]
    assert run(processes, whole, options, Trouble(), resume="auto") == [""]
    assert_same_end(parts, whole)


def test_replicas_that_differ_stop_before_the_save(processes: Processes, data: Path, tmp_path: Path) -> None:
    options = overrides(data, "parallel.expert=2", "train.zero_stage=2", "guard.replica_every=3")
    for message in run(processes, tmp_path / "run", options, Trouble(corrupt=6)):
        assert message.startswith("ReplicaMismatch: step 6: replicas differ: ") and "ranks 0, 1" in message
    (record,) = guard(tmp_path / "run")
    ((name, ranks),) = record["tensors"].items()
    assert name.endswith("router.bias_E") and ranks == [0, 1]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step_00000003"
    warned = tmp_path / "warned"
    assert run(processes, warned, [*options, "guard.replica_mismatch=warn"], Trouble(corrupt=6)) == ["", ""]
    assert [(record["step"], record["action"]) for record in guard(warned)] == [(6, "warn")]
