"""Bytes sent by each collective of a step: the arithmetic of training/traffic.py against every collective that the real
engine hands to a process group. `python -m pytest -s tests/distributed/test_traffic.py` prints the table of
docs/parallelism.md."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from moe_train.routing.options import RouterOptions
from moe_train.training.options import OptimizerOptions
from moe_train.training.traffic import traffic
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.planning import config_of
from tests.distributed.harness.traffic import Call, calls_of_step
from tests.distributed.harness.training import Case
from tests.distributed.test_checkpoint import ROUTER
from tests.distributed.test_families import MODELS
from tests.distributed.test_tensor import FOUR

CASE = Case(router=ROUTER, optimizer=OptimizerOptions(lr=0.01), clip=1.0, padding=False)
BALANCED = CASE.with_(router=RouterOptions("forced_balance", {"top_k": 2}))

WAYS: list[tuple[int, dict[str, Any]]] = [
    (4, {"expert": 2, "zero": 1, "accumulation": 2}),
    (4, {"expert": 2, "zero": 2, "accumulation": 2}),
    (4, {"expert": 2, "zero": 3, "accumulation": 2}),
    (4, {"expert": 2, "zero": 2, "precision": "bfloat16"}),
    (4, {"expert": 2, "zero": 3, "precision": "bfloat16", "recompute": True, "reuse": 0}),
    (2, {"expert": 2, "zero": 1, "recompute": True}),
    (2, {"expert": 1, "zero": 3, "accumulation": 2, "reuse": 0}),
    (4, {"expert": 4, "tensor": 2, "zero": 1, "accumulation": 2}),
]
MORE: list[tuple[int, dict[str, Any]]] = [
    (4, {"expert": 2, "zero": 3, "reuse": 30_000}),
    (4, {"expert": 2, "zero": 3, "reuse": 100_000, "recompute": True}),
    (4, {"expert": 2, "zero": 1, "precision": "bfloat16", "offload": True, "accumulation": 2}),
    (4, {"expert": 2, "zero": 3, "recompute": True, "accumulation": 2}),
    (4, {"expert": 2, "zero": 3, "reuse": 0, "offload": True}),
    (4, {"expert": 4, "zero": 2}),
    (4, {"expert": 4, "zero": 3, "precision": "bfloat16", "reuse": 0, "accumulation": 2}),
    (4, {"expert": 1, "zero": 1, "precision": "bfloat16"}),
    (2, {"expert": 2, "zero": 2, "model": MODELS["deepseek_v3"]}),
    (2, {"expert": 1, "zero": 3, "model": MODELS["llama3"], "recompute": True, "reuse": 0}),
]


def purpose(call: Call, tensor: int = 1) -> str:
    """Named as in the arithmetic; "other" for what that leaves out."""
    kind, elements, _ = call.tensors[0]
    if call.operation == "all_to_all_single":
        return "expert weights" if call.tensors[1][1] == sum(call.splits) else "expert rows"
    if kind == "torch.int64" and call.operation == "all_gather_single":
        return "expert counts"
    if call.group == "tensor":
        activations = call.operation in ("all_gather_single", "reduce_scatter_single") and kind != "torch.int64"
        return "sequence parallelism" if activations else "other"
    divided = tensor > 1 and call.group == "data"
    part = "experts" if call.group == "expert_data" else "divided" if divided else "whole"
    if call.operation == "reduce_scatter_single" or (call.operation == "allreduce" and kind == "torch.float32"):
        return f"gradients ({part})" if elements > 1 else "other"
    return f"parameters ({part})" if call.operation == "all_gather_single" else "other"


def payload(call: Call) -> int:
    """Bytes of the larger side; of an all-to-all those that this rank gives."""
    if call.operation == "all_to_all_single":
        return call.tensors[1][2]
    return max(size for _, _, size in call.tensors)


def measured(ranks: list[list[Call]], tensor: int) -> dict[str, float]:
    """Bytes per rank, averaged over the ranks (balance makes them differ), of collectives among several ranks."""
    found: dict[str, float] = defaultdict(float)
    for call in (call for calls in ranks for call in calls if call.ranks > 1):
        found[purpose(call, tensor)] += payload(call) / len(ranks)
    return dict(found)


def planned(case: Case, size: int) -> dict[str, float]:
    """Payloads by purpose. Without tensor parallelism divided matrices are whole like the rest, and experts, too,
    without expert parallelism."""
    found: dict[str, float] = defaultdict(float)
    for item in traffic(config_of(case, size), size):
        name = item.name if case.tensor > 1 else item.name.replace("(divided)", "(whole)")
        found[name.replace("(experts)", "(whole)") if case.expert == 1 else name] += item.payload
    return dict(found)


@pytest.mark.parametrize(("size", "way"), [*WAYS, *(pytest.param(*w, marks=pytest.mark.slow) for w in MORE)])
def test_payloads_are_those_of_the_engine(processes: Processes, size: int, way: dict[str, Any]) -> None:
    """Exact, but for flat groups of parameters that DeepSpeed fills up to multiples of the ranks, and for parameters of
    ZeRO 3 where some are kept and some are not: upstream counts the distance of reuse in elements of the modules that
    it happens to list."""
    case = CASE.with_(**way)
    got = measured(processes(size).run(calls_of_step, case=case, step=2), case.tensor)
    want, rest = planned(case, size), got.pop("other", 0)
    text = ", ".join(f"{k} {getattr(v, 'family', v)}" for k, v in way.items())
    for name in sorted(got.keys() | want.keys()):
        print(f"| {size} ranks, {text} | {name} | {want.get(name, 0):,.0f} | {got.get(name, 0):,.0f} |")
    assert got.keys() == want.keys()
    for name, bytes_ in want.items():
        parameters = name.startswith("parameters")
        if parameters and case.reuse:
            assert 0.6 * bytes_ <= got[name] <= 1.4 * bytes_
        else:
            assert got[name] == pytest.approx(bytes_, rel=0.01 if parameters else 1e-9)
    assert rest < 0.02 * sum(want.values())


@pytest.mark.slow
def test_four_tensor_ranks(processes: Processes) -> None:
    """All four are the tensor group and share the whole tensors among them: the group does not tell them apart."""
    case = CASE.with_(expert=2, tensor=4, zero=3, model=FOUR)
    got = measured(processes(4).run(calls_of_step, case=case, step=2), case.tensor)
    want, rest = planned(case, 4), got.pop("other", 0)
    want["sequence parallelism"] += want.pop("gradients (whole)") + want.pop("parameters (whole)")
    assert got == pytest.approx(want, rel=0.01) and rest < 0.02 * sum(want.values())


def test_what_leaves_a_rank_with_balanced_experts(processes: Processes) -> None:
    """Of an all-to-all: all rows but those for the rank's own experts."""
    case = BALANCED.with_(expert=2, zero=2)
    for calls in processes(4).run(calls_of_step, case=case, step=0):
        rows = [call for call in calls if purpose(call) == "expert rows"]
        assert rows and all(call.splits[0] == call.splits[1] for call in rows)
    [item] = [item for item in traffic(config_of(case, 4), 4) if item.name == "expert rows"]
    assert item.sent == item.payload / 2
