"""Evaluation where ranks have uneven shares: the same sums as one process that takes the samples one by one."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.data.indexed import IndexedWriter
from moe_train.evaluation.result import EvaluationResult
from tests.distributed.harness import evaluating
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.training import Case
from tests.distributed.test_parity import ROUTERS

SAMPLES = 7


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tokens of seven samples, the last one short, in documents of uneven length."""
    path = str(tmp_path_factory.mktemp("data") / "validation")
    random = np.random.default_rng(7)
    with IndexedWriter(path, vocab_size=100) as writer:
        for length in (5, 20, 1, 25):
            writer.add(random.integers(0, 100, length))
    return path


def numbers(result: EvaluationResult) -> tuple[object, ...]:
    """Everything that is counted."""
    names = ("k_histogram", "coactivation")
    return result.tokens, [[layer.load, *(layer.more[name] for name in names)] for layer in result.layers]


@pytest.mark.parametrize("gate", ROUTERS)
@pytest.mark.parametrize("in_engine", [False, True])
@pytest.mark.parametrize(
    ("size", "expert", "micro_batch"),
    [(2, 2, 3), (4, 2, 2), *(pytest.param(4, 4, n, marks=pytest.mark.slow) for n in (1, 2))],
)
def test_uneven_batches(
    processes: Processes, prefix: str, gate: str, in_engine: bool, size: int, expert: int, micro_batch: int
) -> None:
    """Pitfall 18: DS#6809 (evaluation hangs when ranks have different numbers of batches). Seven samples never divide
    by the ranks; with four ranks of two, one rank has nothing but padding."""
    case = Case(router=ROUTERS[gate], expert=expert, zero=3)
    want = processes(1).run(evaluating.evaluate, case=case.with_(expert=1), prefix=prefix, micro_batch=1)[0]
    results = processes(size).run(
        evaluating.evaluate, case=case, prefix=prefix, micro_batch=micro_batch, in_engine=in_engine
    )
    assert want.tokens == 50
    for got in results:
        assert numbers(got) == numbers(want)
        assert abs(got.loss - want.loss) <= 1e-6 * want.loss
        for ours, theirs in zip(got.layers, want.layers, strict=True):
            assert ours.more["soft_load"] == pytest.approx(theirs.more["soft_load"], rel=1e-5)
            for name in ("router_entropy", "router_margin"):
                assert ours.more[name] == pytest.approx(theirs.more[name], rel=1e-4, abs=1e-6)
