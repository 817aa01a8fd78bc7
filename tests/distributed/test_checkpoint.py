"""Checkpoints across layouts, bit-for-bit resume, and what goes wrong on disk (invariant 8)."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_train.model.families import moe_layer_numbers
from moe_train.routing.options import BalancingOptions, BiasOptions, RouterOptions, SwitchLossOptions
from moe_train.training.options import OptimizerOptions
from tests.distributed.harness import checkpointing
from tests.distributed.harness.checkpointing import Snapshot
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.training import MODEL, Case
from tests.distributed.test_families import MODELS
from tests.distributed.test_parity import ROUTERS

ROUTER = RouterOptions(
    "softmax_topk", {"top_k": 2}, BalancingOptions(SwitchLossOptions(0.1, "sequence"), bias=BiasOptions(0.01))
)
CASE = Case(router=ROUTER, optimizer=OptimizerOptions(lr=0.01), clip=1.0, accumulation=2)
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
TARGETS = list(itertools.product(LAYOUTS, [1, 2, 3]))
FAST_TARGETS = [t for i, t in enumerate(TARGETS) if i % 4 == 0 or t[0] == (1, 1)]
Way = tuple[int, int, int]
"""(processes, EP, ZeRO stage)"""
AND_BACK: list[tuple[Way, Way]] = [
    ((1, 1, 1), (4, 2, 2)),
    ((4, 4, 1), (4, 2, 3)),
    ((2, 1, 3), (4, 2, 1)),
    ((1, 1, 1), (2, 2, 3)),
    ((2, 1, 3), (1, 1, 1)),
    ((4, 4, 1), (2, 1, 2)),
]
"""(written by, read by)"""


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def assert_same(got: Snapshot, want: Snapshot) -> None:
    assert same(got.weights, want.weights)
    for kind, moments in want.moments.items():
        assert any(".experts." in name for name in moments)
        assert same(got.moments[kind], moments), kind
    assert want.buffers and same(got.buffers, want.buffers)
    assert got.optimizer_steps == want.optimizer_steps


@pytest.fixture(scope="module")
def saved(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Snapshot]:
    """A checkpoint of 4 processes, EP2 x expert-DP 2, ZeRO 2, after two steps."""
    root = str(tmp_path_factory.mktemp("saved"))
    case = CASE.with_(expert=2, zero=2)
    want = processes(4).run(checkpointing.train_and_save, case=case, root=root, saves=[2], until=2)[0]
    assert all(bias.any() for bias in want.buffers.values())
    return f"{root}/step_00000002", want


@pytest.mark.parametrize(
    ("layout", "zero"),
    [*FAST_TARGETS, *(pytest.param(*t, marks=pytest.mark.slow) for t in TARGETS if t not in FAST_TARGETS)],
)
def test_any_layout_loads_it_exactly(
    processes: Processes, saved: tuple[str, Snapshot], layout: tuple[int, int], zero: int
) -> None:
    """Pitfall 21: KempnerForge#202, DS#6589, pith-train PR89 (the experts of one rank only, silently). Pitfall 25:
    DS#2898/#3810/#2921, #5716 (another number of ranks)."""
    directory, want = saved
    size, expert = layout
    case = CASE.with_(expert=expert, zero=zero)
    loaded, after, state = processes(size).run(checkpointing.resume, case=case, directory=directory, until=3)[0]
    assert_same(loaded, want)
    assert state["consumed_samples"] == 32 and state["tokens"] == 256
    assert not same(after.weights, want.weights)


@pytest.fixture(scope="module")
def written(
    request: pytest.FixtureRequest, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Snapshot]:
    """A checkpoint after two steps of the layout that the test gives."""
    size, expert, zero = request.param
    root = str(tmp_path_factory.mktemp("written"))
    case = CASE.with_(expert=expert, zero=zero)
    want = processes(size).run(checkpointing.train_and_save, case=case, root=root, saves=[2], until=2)[0]
    return f"{root}/step_00000002", want


@pytest.mark.parametrize(
    ("written", "reader"),
    [pytest.param(*w, marks=pytest.mark.slow if i > 1 else []) for i, w in enumerate(AND_BACK)],
    indirect=["written"],
    ids=[f"{writer} to {reader}" for writer, reader in AND_BACK],
)
def test_any_layout_writes_it_for_any_other(processes: Processes, written: tuple[str, Snapshot], reader: Way) -> None:
    """Also from few ranks to many, and from experts that are whole or spread further than they are read."""
    directory, want = written
    size, expert, zero = reader
    case = CASE.with_(expert=expert, zero=zero)
    loaded, after, state = processes(size).run(checkpointing.resume, case=case, directory=directory, until=3)[0]
    assert_same(loaded, want)
    assert state["consumed_samples"] == 32 and not same(after.weights, want.weights)


@pytest.mark.parametrize(("size", "expert"), [(1, 1), (2, 2), (4, 4), (4, 1)])
def test_a_plain_model_loads_the_weights(
    processes: Processes, saved: tuple[str, Snapshot], size: int, expert: int
) -> None:
    directory, want = saved
    case = CASE.with_(expert=expert)
    differing = processes(size).run(checkpointing.weights_of_model, case=case, directory=directory, whole=want.weights)
    assert differing == [[]] * size


def test_another_layout_goes_on_along_the_same_curve(
    processes: Processes, saved: tuple[str, Snapshot], tmp_path: Path
) -> None:
    directory, _ = saved
    ways = [(1, CASE), (2, CASE.with_(expert=2, zero=3, recompute=True)), (4, CASE.with_(expert=2, zero=2))]
    losses = [
        [
            r.loss
            for r in processes(size).run(checkpointing.resume, case=case, directory=directory, until=5)[0][1].records
        ]
        for size, case in ways
    ]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


RESUMES = [
    (1, CASE),
    (2, CASE.with_(expert=2, zero=1)),
    (2, CASE.with_(expert=2, zero=3, recompute=True)),
    (4, CASE.with_(expert=2, zero=2)),
    (4, CASE.with_(expert=4, zero=3)),
    (2, CASE.with_(expert=2, zero=2, precision="bfloat16")),
    (2, CASE.with_(expert=2, zero=3, precision="bfloat16")),
    (2, CASE.with_(expert=2, zero=2, optimizer=dataclasses.replace(CASE.optimizer, name="sgd"))),
    (2, CASE.with_(expert=2, zero=2, router=ROUTERS["sigmoid_topk in groups"])),
    (2, CASE.with_(expert=2, zero=3, model=MODELS["deepseek_v3"])),
    (2, CASE.with_(expert=2, zero=2, model=MODELS["deepseek_v3 direct"], precision="bfloat16")),
    (2, CASE.with_(expert=2, zero=1, model=MODELS["mixed"], recompute=True)),
    (2, CASE.with_(zero=2, model=MODELS["llama3"])),
]
SLOW_RESUMES = (4, 6, 7, 9, 12)


@pytest.mark.parametrize(
    ("size", "case"),
    [pytest.param(*c, marks=pytest.mark.slow if i in SLOW_RESUMES else []) for i, c in enumerate(RESUMES)],
    ids=range(len(RESUMES)),
)
def test_resume_is_bit_for_bit(processes: Processes, tmp_path: Path, size: int, case: Case) -> None:
    """Pitfall 20: M#761, DS#8147/PR8198 (moments of experts stale after a resume). Pitfall 13: FlagScale PR412,
    ms-swift#6793 (bias not saved). Two steps more are compared as well: stale state would show there."""
    pool = processes(size)
    want = pool.run(checkpointing.train_and_save, case=case, root=str(tmp_path), saves=[2], until=4)
    directory = str(tmp_path / "step_00000002")
    for rank, (loaded, after, _) in enumerate(pool.run(checkpointing.resume, case=case, directory=directory, until=4)):
        assert loaded.optimizer_steps == (2 if case.optimizer.name == "adamw" else 0)
        assert same(after.weights, want[rank].weights)
        assert same(after.buffers, want[rank].buffers)
        for kind in ("exp_avg", "exp_avg_sq"):
            assert same(after.moments[kind], want[rank].moments[kind])
        for got, record in zip(after.records, want[rank].records[2:], strict=True):
            assert (got.loss, got.gradient_norm) == (record.loss, record.gradient_norm)
    assert bool(want[0].buffers) == bool(moe_layer_numbers(case.model))
    assert all(bias.any() for bias in want[0].buffers.values())
    assert want[0].weights and (want[0].moments["exp_avg"] or case.optimizer.name == "sgd")


@pytest.mark.parametrize("name", ["deepseek_v3", pytest.param("mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("zero", "target"), [(2, 3), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_any_family_goes_from_two_ranks_of_experts_to_one(
    processes: Processes, tmp_path: Path, name: str, zero: int, target: int
) -> None:
    case = CASE.with_(model=MODELS[name], expert=2, zero=zero)
    want = processes(2).run(checkpointing.train_and_save, case=case, root=str(tmp_path), saves=[2], until=2)[0]
    directory = str(tmp_path / "step_00000002")
    alone = case.with_(expert=1, zero=target)
    loaded, after, _ = processes(1).run(checkpointing.resume, case=alone, directory=directory, until=4)[0]
    assert_same(loaded, want)
    assert any(key.startswith("mtp.") for key in loaded.weights) == (name == "deepseek_v3")
    _, there, _ = processes(2).run(checkpointing.resume, case=case, directory=directory, until=4)[0]
    assert [r.loss for r in after.records] == pytest.approx([r.loss for r in there.records], rel=1e-5)
    differing = processes(1).run(checkpointing.weights_of_model, case=alone, directory=directory, whole=loaded.weights)
    assert differing == [[]]


def test_another_geometry_is_refused_by_name(processes: Processes, saved: tuple[str, Snapshot]) -> None:
    directory, _ = saved
    wider = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, expert_hidden_size=48))
    for kind, message in processes(2).run(
        checkpointing.error_of_load, case=CASE.with_(model=wider, expert=2), directory=directory
    ):
        assert kind == "ValueError"
        assert "model.decoder.layers.0.mlp.experts.weight1: shape (8, 64, 64) in the checkpoint, (8, 96, 64)" in message
    tied = dataclasses.replace(MODEL, tie_embeddings=True)
    (kind, message), *_ = processes(1).run(
        checkpointing.error_of_load, case=CASE.with_(model=tied), directory=directory
    )
    assert kind == "ValueError" and "not in this model: model.output_layer.weight" in message
    deeper = dataclasses.replace(MODEL, num_layers=3)
    (kind, message), *_ = processes(1).run(
        checkpointing.error_of_load, case=CASE.with_(model=deeper), directory=directory
    )
    assert kind == "ValueError" and "missing in the checkpoint: " in message and "decoder.layers.2." in message


@pytest.mark.parametrize("damage", ["index gone", "state gone", "data gone", "data truncated", "data empty"])
def test_a_damaged_checkpoint_is_a_clear_error(processes: Processes, tmp_path: Path, damage: str) -> None:
    case = CASE.with_(expert=2)
    processes(2).run(checkpointing.train_and_save, case=case, root=str(tmp_path), saves=[1], until=1)
    directory = tmp_path / "step_00000001"
    data = sorted(directory.glob("*.distcp"))
    assert len(data) == 2
    victim = {"index gone": directory / "index.json", "state gone": directory / "state.json"}.get(damage, data[1])
    if damage.endswith("gone"):
        victim.unlink()
    else:
        os.truncate(victim, 0 if damage == "data empty" else victim.stat().st_size // 2)
    for kind, message in processes(2).run(checkpointing.error_of_load, case=case, directory=str(directory)):
        assert kind == "ValueError", f"{kind}: {message}"
        assert str(directory) in message


@pytest.mark.parametrize(("failing_rank", "where"), [(0, "data"), (1, "data"), (0, "state")])
def test_a_rank_that_cannot_write(processes: Processes, tmp_path: Path, failing_rank: int, where: str) -> None:
    """Pitfall 24: AM PR3261, lightning#688 (an interrupted save bricks resume or hangs the other ranks)."""
    case = CASE.with_(expert=2)
    errors = processes(2).run(
        checkpointing.save_on_a_full_disk, case=case, root=str(tmp_path), failing_rank=failing_rank, where=where
    )
    _assert_first_checkpoint_stands(processes, case, tmp_path, errors)


def _assert_first_checkpoint_stands(
    processes: Processes, case: Case, root: Path, errors: list[tuple[str, str]]
) -> None:
    for kind, message in errors:
        assert kind == "CheckpointError", f"{kind}: {message}"
        assert "No space left on device" in message and "step_00000002" in message
    assert processes(2).run(checkpointing.latest, root=str(root)) == ["step_00000001"] * 2
    directory = str(root / "step_00000001")
    loaded, _, state = processes(2).run(checkpointing.resume, case=case, directory=directory, until=2)[0]
    assert state["consumed_samples"] == case.sequences and loaded.weights


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full(processes: Processes, small_disk: Path) -> None:
    """One checkpoint of this model and its moments takes 1.7 MB, so that a third does not fit, nor a second with the
    first two kept."""
    case = CASE.with_(expert=2)
    (small_disk / "ballast").write_bytes(b"\0" * 1_500_000)
    errors = processes(2).run(
        checkpointing.save_on_a_full_disk, case=case, root=str(small_disk), failing_rank=None, where="device"
    )
    _assert_first_checkpoint_stands(processes, case, small_disk, errors)


def test_only_the_newest_are_kept(processes: Processes, tmp_path: Path) -> None:
    case = CASE.with_(expert=2)
    run = checkpointing.train_and_save
    processes(2).run(run, case=case, root=str(tmp_path), saves=[1, 2, 3], until=3, keep=2)
    assert processes(2).run(checkpointing.latest, root=str(tmp_path)) == ["step_00000003"] * 2
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000002", "step_00000003"]


def test_a_step_that_is_saved_again_replaces_the_old_one(processes: Processes, tmp_path: Path) -> None:
    """Until the new one is in place the old one is found, whenever the save is cut off."""
    case = CASE.with_(expert=2)
    processes(2).run(checkpointing.train_and_save, case=case, root=str(tmp_path), saves=[1], until=1)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000001.replaced")
    assert processes(2).run(checkpointing.latest, root=str(tmp_path)) == ["step_00000001.replaced"] * 2
    processes(2).run(checkpointing.train_and_save, case=case.with_(seed=5), root=str(tmp_path), saves=[1], until=1)
    assert processes(2).run(checkpointing.latest, root=str(tmp_path)) == ["step_00000001"] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_the_generators_go_on(processes: Processes, tmp_path: Path) -> None:
    ranks = processes(2).run(checkpointing.draws_around_a_checkpoint, case=CASE.with_(expert=2), root=str(tmp_path))
    for after_save, later, after_load in ranks:
        assert torch.equal(after_load, after_save) and not torch.equal(later, after_save)
    assert not torch.equal(ranks[0][0], ranks[1][0])


@pytest.mark.parametrize(("size", "expert"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_resume_under_zero_3_as_users_have_it(processes: Processes, tmp_path: Path, size: int, expert: int) -> None:
    """Small parameters stay whole on every rank (DeepSpeed's default), not only in pieces as elsewhere here."""
    case = CASE.with_(expert=expert, zero=3, persistent=True)
    want = processes(size).run(checkpointing.train_and_save, case=case, root=str(tmp_path), saves=[2], until=3)[0]
    directory = str(tmp_path / "step_00000002")
    _, after, _ = processes(size).run(checkpointing.resume, case=case, directory=directory, until=3)[0]
    assert_same(after, want)
