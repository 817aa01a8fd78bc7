"""Memory of a rank: the arithmetic of training/memory.py and training/buffers.py against the real engine's tensors.
`python -m pytest -s tests/distributed/test_memory.py` prints the table of docs/parallelism.md."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from moe_train.routing.options import RouterOptions
from moe_train.training.buffers import buffers_per_rank
from moe_train.training.memory import host_memory_per_rank, memory_per_rank, weight_bytes
from moe_train.training.options import OptimizerOptions
from tests.distributed.harness import memory
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.planning import config_of
from tests.distributed.harness.training import MODEL, Case
from tests.distributed.test_checkpoint import ROUTER
from tests.distributed.test_families import MODELS

CASE = Case(router=ROUTER, optimizer=OptimizerOptions(lr=0.01), clip=1.0, padding=False, accumulation=2, steps=2)
TOLERANCE = 0.01
"""DeepSpeed fills its flat groups of parameters up to multiples of the ranks."""
WAYS: list[tuple[int, int, int, Any]] = [
    way for way in itertools.product([1, 2, 4], [1, 2], [1, 2, 3], ["float32", "bfloat16"]) if way[0] >= way[1]
]
FAST = [(4, 2, 1, "bfloat16"), (4, 2, 2, "float32"), (4, 2, 3, "bfloat16"), (2, 2, 2, "bfloat16"), (2, 1, 3, "float32")]
SLOW = [way for way in WAYS if way not in FAST]


@pytest.mark.parametrize(
    ("size", "expert", "zero", "precision"), [*FAST, *(pytest.param(*w, marks=pytest.mark.slow) for w in SLOW)]
)
def test_what_an_engine_holds(processes: Processes, size: int, expert: int, zero: int, precision: Any) -> None:
    case = CASE.with_(expert=expert, zero=zero, precision=precision)
    _compare(processes, case, size)


@pytest.mark.parametrize(("zero", "precision"), [(1, "float32"), (2, "bfloat16"), (3, "bfloat16")])
def test_what_an_offloaded_optimizer_takes(processes: Processes, zero: int, precision: Any) -> None:
    """All is host memory here; on an accelerator gradients of ZeRO 1 and 2 stay there (2: in bfloat16)."""
    case = CASE.with_(expert=2, zero=zero, precision=precision, offload=True)
    config = config_of(case, 2)
    want = host_memory_per_rank(config, 2)
    for rank in processes(2).run(memory.held, case=case):
        assert rank["host"] == pytest.approx(want.optimizer, rel=TOLERANCE)
        assert rank["save_copy"] == pytest.approx(want.save_copy, rel=TOLERANCE)
        assert rank["parameters"] == pytest.approx(memory_per_rank(config, 2).parameters, rel=TOLERANCE)
    assert memory_per_rank(config, 2).optimizer == 0


@pytest.mark.parametrize("name", ["deepseek_v3", "llama3"])
def test_other_families(processes: Processes, name: str) -> None:
    _compare(processes, CASE.with_(model=MODELS[name], expert=2 if name == "deepseek_v3" else 1, zero=2), 2)


@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_tensor_parallelism(processes: Processes, zero: int) -> None:
    _compare(processes, CASE.with_(tensor=2, expert=2, zero=zero), 4)


def _compare(processes: Processes, case: Case, size: int) -> None:
    config = config_of(case, size)
    want, buffers = memory_per_rank(config, size), buffers_per_rank(config, size)
    figures = {"parameters": want.parameters, "gradients": want.gradients, "optimizer": want.optimizer}
    # A single rank on the CPU reduces nothing (training/one_rank.py); an accelerator has the bucket all the same.
    alone = size == 1 and case.zero < 3 and case.precision == "float32"
    figures["bucket"] = 0 if alone else buffers.bucket
    figures["save_copy"] = host_memory_per_rank(config, size).save_copy
    ranks = processes(size).run(memory.held, case=case)
    for name, bytes_ in figures.items():
        layout = f"{size} ranks, EP {case.expert}, ZeRO {case.zero}, {case.precision}"
        print(f"| {layout} | {name} | {bytes_:,} | {ranks[0][name]:,} |")
        got = [rank[name] for rank in ranks]
        if name == "gradients" and (case.zero, case.precision) == (2, "float32"):
            # Gradients that the border of a rank's share cuts stay whole: much of a model as small as this, and the
            # more, the smaller the share is.
            assert all((1 - TOLERANCE) * bytes_ <= x <= (1 + size / 4) * bytes_ for x in got), got
        else:
            assert got == pytest.approx([bytes_] * size, rel=TOLERANCE), name


@pytest.mark.parametrize("reuse", [None, 0, 30_000])
def test_parameters_that_zero_3_keeps_whole(processes: Processes, reuse: int | None) -> None:
    """At most what is computed; all of them with DeepSpeed's default, as this model is small."""
    case = CASE.with_(expert=2, zero=3, reuse=reuse)
    config = config_of(case, 4)
    want = buffers_per_rank(config, 4).gathered // weight_bytes(config)
    whole = max(rank["whole"] for rank in processes(4).run(memory.held, case=case))
    print(f"reuse {reuse}: at most {want:,} elements, {whole:,} were whole")
    assert 0.5 * want <= whole <= want
    assert reuse is not None or whole == want


@pytest.mark.parametrize(("size", "expert", "recompute"), [(2, 2, False), (4, 2, True), (4, 4, False)])
def test_activations_with_experts_on_several_ranks(
    processes: Processes, size: int, expert: int, recompute: bool
) -> None:
    """What autograd keeps on a rank where every expert has the same load. With recomputation: the inputs of all
    layers; the arithmetic adds one layer, which is there in the backward pass."""
    model = dataclasses.replace(MODEL, num_layers=3, loss_chunk_tokens=1)
    case = Case(model=model, router=RouterOptions("forced_balance", {"top_k": 2}), expert=expert, recompute=recompute)
    case = case.with_(padding=False, length=64, sequences=2 * size)
    config = config_of(case, size)
    want = memory_per_rank(config, size).activations
    if recompute:
        want -= _one_layer(case, size)
    kept = processes(size).run(memory.activation_bytes, case=case)
    print(f"| {size} ranks, EP {expert}, recompute {recompute} | activations | {want:,} | {max(kept):,} |")
    assert all(bytes_ == pytest.approx(want, rel=0.1) for bytes_ in kept)


def _one_layer(case: Case, size: int) -> int:
    """Activations of a layer by the same arithmetic."""
    deeper = dataclasses.replace(case.model, num_layers=case.model.num_layers + 1)
    plain = case.with_(recompute=False)
    one, two = (memory_per_rank(config_of(c, size), size) for c in (plain, plain.with_(model=deeper)))
    return two.activations - one.activations
