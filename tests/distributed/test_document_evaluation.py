"""Documents one by one, over several processes with uneven shares: the same as each document alone, without padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_train.data.indexed import IndexedWriter
from tests.distributed.harness import evaluating_documents
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.training import Case
from tests.distributed.test_parity import ROUTERS

LENGTHS = (5, 8, 2, 20, 1, 7, 8, 11, 3)
MAX_LENGTH, BATCH_DOCUMENTS = 8, 4


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    random = np.random.default_rng(61)
    return [random.integers(0, 100, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def prefix(documents: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "validation"
    with IndexedWriter(path, vocab_size=100) as writer:
        for document in documents:
            writer.add(document)
    return str(Path(path))


@pytest.mark.parametrize("gate", ROUTERS)
@pytest.mark.parametrize(("size", "expert", "micro_batch"), [(1, 1, 4), (2, 2, 2), (2, 1, 3)])
def test_both_losses_and_the_load(
    processes: Processes,
    documents: list[np.ndarray],
    prefix: str,
    gate: str,
    size: int,
    expert: int,
    micro_batch: int,
) -> None:
    case = Case(router=ROUTERS[gate], expert=expert)
    cut = [document[:MAX_LENGTH].tolist() for document in documents]
    [alone] = processes(1).run(evaluating_documents.each_alone, case=case.with_(expert=1), documents=cut)
    targets = [len(document) - 1 for document in cut]
    nll = [nll for nll, _ in alone]
    groups = [slice(start, start + BATCH_DOCUMENTS) for start in range(0, len(cut), BATCH_DOCUMENTS)]
    average = sum(sum(nll[g]) / sum(targets[g]) * len(targets[g]) for g in groups) / len(cut)
    load = np.sum([load for _, load in alone], axis=0)

    results = processes(size).run(
        evaluating_documents.evaluate_documents,
        case=case,
        prefix=prefix,
        micro_batch=micro_batch,
        max_length=MAX_LENGTH,
        batch_documents=BATCH_DOCUMENTS,
    )
    for result, counts in results:
        assert (result.tokens, result.routed_tokens) == (sum(targets), sum(targets))
        assert result.loss == pytest.approx(sum(nll) / sum(targets), rel=1e-6)
        assert counts["loss_batch_average"] == pytest.approx(average, rel=1e-6)
        assert [layer.load for layer in result.layers] == load.tolist()
        assert {name: counts[name] for name in ("documents", "truncated", "max_length", "batch_documents")} == {
            "documents": len(cut),
            "truncated": 2,
            "max_length": MAX_LENGTH,
            "batch_documents": BATCH_DOCUMENTS,
        }
    assert abs(average - sum(nll) / sum(targets)) > 1e-4  # else the two could not be told apart
