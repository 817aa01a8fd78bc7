"""State of every registered gate through a checkpoint: stop, load, go on, and get the bits of never having stopped.

The gate alone: tests/unit/routing/test_conformance_state.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.routing.balanced_gate import BalancedGate
from moe_train.training.options import OptimizerOptions
from tests.distributed.harness import checkpointing
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.training import MODEL, Case
from tests.distributed.test_gates import DEFAULTS, FURTHER, identity, router

ALL = [*DEFAULTS, *FURTHER]
FAST = [
    ("relu", {}),
    ("quantile_balancing", {}),
    ("dynamic_k", {"threshold": {"start": 0.9, "end": 0.3, "steps": 3}}),
    ("lpr", {"similarity": "js", "prototypes": "ema", "latent_dim": 4}),
]
"""One of each kind of state; the bias goes with the last, too."""


def own_state(name: str, options: dict[str, Any], moving: bool = False) -> set[str]:
    """Names of buffers, without the layer; only of those that move."""
    gate = BalancedGate(router(name, options), MODEL.hidden_size, 8)
    return {n for n, _ in gate.named_buffers() if not (moving and gate.state_follows[n] == "nothing")}


def resumes(processes: Processes, size: int, case: Case, root: Path) -> None:
    pool = processes(size)
    want = pool.run(checkpointing.train_and_save, case=case, root=str(root), saves=[2], until=3)
    got = pool.run(checkpointing.resume, case=case, directory=str(root / "step_00000002"), until=3)
    names = own_state(case.router.gate, case.router.options)
    for (loaded, after, _), whole in zip(got, want, strict=True):
        before, straight = whole.records[1].state, whole.records[2]
        assert {name.partition(".router.")[2] for name in before} == names
        assert loaded.buffers.keys() == before.keys() == after.buffers.keys()
        for name, value in before.items():
            assert loaded.buffers[name].dtype == value.dtype and torch.equal(loaded.buffers[name], value), name
            assert torch.equal(after.buffers[name], straight.state[name]), name
        (record,) = after.records
        assert (record.loss, record.gradient_norm) == (straight.loss, straight.gradient_norm)
        assert record.auxiliary == straight.auxiliary and torch.equal(record.load_LE, straight.load_LE)
        assert after.weights.keys() == whole.weights.keys()
        assert all(torch.equal(after.weights[name], value) for name, value in whole.weights.items())


RAMP = {"threshold": {"start": 0.9, "end": 0.3, "steps": 3}}


@pytest.mark.parametrize(("there", "now"), [(RAMP, RAMP), ({}, RAMP), (RAMP, {})], ids=["ramp", "gets one", "had one"])
def test_a_run_that_begins_with_weights_counts_its_own_steps(
    processes: Processes, tmp_path: Path, there: dict[str, Any], now: dict[str, Any]
) -> None:
    """A ramp begins anew, as everything else does that goes by the step, whether or not the source counted steps."""
    pool = processes(1)
    (whole,) = pool.run(
        checkpointing.train_and_save, case=case_of("dynamic_k", there), root=str(tmp_path), saves=[2], until=2
    )
    directory = str(tmp_path / "step_00000002")
    weights, buffers = pool.run(checkpointing.begin_with, case=case_of("dynamic_k", now), directory=directory)[0]
    assert weights.keys() == whole.weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in whole.weights.items())
    assert all(value.eq(2).all() for value in whole.buffers.values()) and len(whole.buffers) == 2 * (there == RAMP)
    assert all(value.eq(0).all() for value in buffers.values()) and len(buffers) == 2 * (now == RAMP)


def test_other_state_is_taken_over(processes: Processes, tmp_path: Path) -> None:
    """Bias and coefficients go by counts, not by steps."""
    pool, case = processes(1), case_of("relu", {})
    (whole,) = pool.run(checkpointing.train_and_save, case=case, root=str(tmp_path), saves=[2], until=2)
    _, buffers = pool.run(checkpointing.begin_with, case=case, directory=str(tmp_path / "step_00000002"))[0]
    assert buffers.keys() == whole.buffers.keys()
    assert buffers and all(torch.equal(buffers[name], value) for name, value in whole.buffers.items())


def case_of(name: str, options: dict[str, Any], **changes: Any) -> Case:
    return Case(router=router(name, options), optimizer=OptimizerOptions(lr=0.01), accumulation=2, **changes)


def test_the_fast_cases_are_of_every_kind() -> None:
    kinds = {kind for name, options in ALL for kind in own_state(name, options, moving=True)}
    assert kinds == {kind for name, options in FAST for kind in own_state(name, options)}


@pytest.mark.parametrize(("name", "options"), FAST, ids=identity)
def test_resume_of_one_process(processes: Processes, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    resumes(processes, 1, case_of(name, options), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), ALL, ids=identity)
def test_resume_of_two_processes(processes: Processes, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    resumes(processes, 2, case_of(name, options, expert=2, zero=2), tmp_path)
