"""Training data on several ranks and nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.data.dataset import open_dataset
from moe_train.data.indexed import IndexedWriter
from moe_train.data.options import BlendMember, DataOptions, Stage
from moe_train.routing.gates.softmax_topk import SoftmaxTopKOptions
from moe_train.routing.options import RouterOptions
from tests.distributed.harness import data
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.training import Case


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets, documents of 0 to 20 tokens."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(3)
    for name, documents in (("a", 120), ("b", 40)):
        with IndexedWriter(root / f"{name}_text_document", 100) as writer:
            for _ in range(documents):
                writer.add(rng.integers(0, 100, rng.integers(0, 20)))
    return root


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("node_of", [[0, 1], [0, 0], [0, 0, 1, 1], [0, 1, 1, 1]])
def test_each_node_writes_its_index_once(
    processes: Processes, folder: Path, tmp_path: Path, node_of: list[int], pack: bool
) -> None:
    """pitfalls row 32 (M#907, MB PR5107): nodes need not share a disk, and no process reads what is not written yet."""
    options = DataOptions(train=str(folder / "a"), sequence_length=12, sampler="documents", pack_documents=pack)
    seen = processes(len(node_of)).run(data.open_on_nodes, options=options, folder=tmp_path, node_of=node_of)
    for node in set(node_of):
        assert [s["writes"] for s, of in zip(seen, node_of, strict=True) if of == node] == [
            1,
            *[0] * (node_of.count(node) - 1),
        ]
    for found in seen:
        assert np.array_equal(found["ids"], seen[0]["ids"]) and found["mapped"]
        assert found["bytes"] == 16 + 8 * found["samples"]
    again = processes(len(node_of)).run(data.open_on_nodes, options=options, folder=tmp_path, node_of=node_of)
    assert all(found["writes"] == 0 for found in again)
    assert np.array_equal(again[-1]["ids"], seen[0]["ids"])


def test_an_index_that_cannot_be_written_stops_every_rank(processes: Processes, folder: Path, tmp_path: Path) -> None:
    options = DataOptions(train=str(folder / "a"), sequence_length=12, sampler="documents")
    seen = processes(2).run(data.open_on_nodes, options=options, folder=tmp_path, node_of=[0, 1], broken=1)
    assert all("node_1" in found["error"] for found in seen) and seen[0]["error"].startswith("rank 1: ")
    assert [found["writes"] for found in seen] == [1, 0]


TOP_K = SoftmaxTopKOptions().top_k
KINDS: dict[str, dict[str, Any]] = {
    "reset": {"reset_at_documents": True},
    "documents": {"sampler": "documents"},
    "pack": {"sampler": "documents", "pack_documents": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "changes"), [(2, {"expert": 2}), pytest.param(4, {"zero": 3, "accumulation": 2}, marks=pytest.mark.slow)]
)
def test_training_does_not_depend_on_the_ranks(
    processes: Processes, folder: Path, tmp_path: Path, kind: str, size: int, changes: dict[str, Any]
) -> None:
    """Padding, cut attention and uneven numbers of targets, in a blend that changes at the second step. Then the last
    step alone, as after a resume. ``recompute`` where there is accumulation."""
    options = DataOptions(
        train=[BlendMember(str(folder / "a"), 2), BlendMember(str(folder / "b"), 1)],
        stages=[Stage(1, str(folder / "b"))],
        sequence_length=8,
        **KINDS[kind],
    )
    case = Case(router=RouterOptions(gate="softmax_topk"), length=8)
    other = case.with_(recompute="accumulation" in changes, **changes)
    want = processes(1).run(data.train, case=case, options=options, folder=tmp_path)[0]
    seen = processes(size).run(data.train, case=other, options=options, folder=tmp_path)
    for number, expected in enumerate(want):
        first = number * case.sequences
        assert [index for index, _, _ in expected.read] == list(range(first, first + case.sequences))
        # No sample is lost, read twice or read otherwise.
        assert sorted(row for found in seen for row in found[number].read) == expected.read
        tokens = sum(len(ids) for _, ids, _ in expected.read)
        assert (tokens < case.sequences * 8) == (kind != "reset"), "whether there is padding"
        assert expected.tokens == tokens
        # Every token that is there is given to its experts in every layer, and padding to none.
        assert expected.load_LE.sum(axis=1).tolist() == [tokens * TOP_K] * case.model.num_layers
        for got in (found[number] for found in seen):
            assert got.loss == pytest.approx(expected.loss, rel=1e-6)
            assert (got.targets, got.tokens) == (expected.targets, expected.tokens)
            assert np.array_equal(got.load_LE, expected.load_LE)
    later = processes(size).run(data.train, case=other.with_(steps=1), options=options, folder=tmp_path, first_step=2)
    for [step], whole in zip(later, seen, strict=True):
        assert step.read == whole[2].read and len(step.read) == case.sequences // size
        assert (step.targets, step.tokens) == (want[2].targets, want[2].tokens)


@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_does_not_depend_on_the_ranks(
    processes: Processes, folder: Path, tmp_path: Path, kind: str, weights: tuple[float, float] | None
) -> None:
    """Two data sets, cut as in training, ranks with uneven shares."""
    names = [str(folder / name) for name in "ab"]
    validation: list[Any] = (
        names if weights is None else [BlendMember(*pair) for pair in zip(names, weights, strict=True)]
    )
    options = DataOptions(validation=validation, sequence_length=8, **KINDS[kind])
    case = Case(router=RouterOptions(gate="softmax_topk"), length=8)
    arguments: dict[str, Any] = {"case": case, "options": options, "folder": tmp_path}
    [want] = processes(1).run(data.evaluate, micro_batch=1, **arguments)
    for got in processes(2).run(data.evaluate, micro_batch=7, **arguments):
        assert got.loss == pytest.approx(want.loss, rel=1e-6) and got.tokens == want.tokens
        assert [layer.load for layer in got.layers] == [layer.load for layer in want.layers]
    assert [sum(layer.load) for layer in want.layers] == [want.routed_tokens * TOP_K] * case.model.num_layers
    if weights is None and kind != "reset":
        lengths = [np.diff(open_dataset(name).document_bounds(0, len(open_dataset(name)))) for name in names]
        assert want.tokens == sum(int(np.clip(n - 1, 0, 8).sum()) for n in lengths)
