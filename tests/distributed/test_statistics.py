"""Statistics of routing over several processes: the same as in one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from moe_train.data.indexed import IndexedWriter
from moe_train.routing.options import BalancingOptions, RouterOptions
from tests.distributed.harness import evaluating, training
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.training import Case


@pytest.mark.parametrize("size", [1, 2])
def test_z_is_measured_with_and_without_the_loss(processes: Processes, size: int) -> None:
    """Row 5 (Megatron-LM PR2121): over tokens without padding, from all ranks and micro-batches."""
    with_loss = Case(
        router=RouterOptions("softmax_topk", {"top_k": 2}, BalancingOptions(z_loss=0.01)),
        expert=size,
        accumulation=2,
        recompute=True,
        steps=1,
    )
    without = with_loss.with_(router=RouterOptions("softmax_topk", {"top_k": 2}))
    [measured, *_] = processes(size).run(training.train, case=with_loss)
    [silent, *_] = processes(size).run(training.train, case=without)
    wanted = [losses["z"] for losses in measured[0].auxiliary]
    assert len(wanted) == 2 and measured[0].z == pytest.approx(wanted, rel=1e-5)
    assert silent[0].z == pytest.approx(wanted, rel=1e-5) and "z" not in silent[0].auxiliary[0]


def test_any_number_of_experts_per_token_has_a_z(processes: Processes) -> None:
    [records] = processes(1).run(training.train, case=Case(router=RouterOptions("dynamic_k"), steps=1))
    assert len(records[0].z) == 2 and all(z is not None and z > 0 for z in records[0].z)


def test_blend_by_data_set_and_the_trace_of_several_processes(processes: Processes, tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("first", "second")]
    random = np.random.default_rng(3)
    for name, tokens in zip(names, (40, 21), strict=True):
        with IndexedWriter(name, vocab_size=100) as writer:
            writer.add(random.integers(0, 100, tokens))
    case = Case(router=RouterOptions("softmax_topk", {"top_k": 2}))
    traces, results = [], []
    for size in (1, 2):
        path = tmp_path / f"trace{size}.parquet"
        found = processes(size).run(
            evaluating.evaluate_blend, case=case.with_(expert=size), names=names, micro_batch=2, trace=path
        )
        assert all(result.to_json() == found[0].to_json() for result in found)
        results.append(found[0])
        traces.append(sorted(pq.read_table(path).to_pylist(), key=lambda r: (r["sample"], r["position"], r["layer"])))
        assert not list(tmp_path.glob(f"{path.name}.*"))
    one, two = results
    assert list(one.domains) == names and [domain.tokens for domain in one.domains.values()] == [39, 20]
    assert {name: d.load for name, d in one.domains.items()} == {name: d.load for name, d in two.domains.items()}
    for ours, theirs in zip(*traces, strict=True):
        assert ours.pop("weights") == pytest.approx(theirs.pop("weights"), abs=1e-5)
        assert ours == theirs
    rows = traces[0]
    assert Counter(row["data"] for row in rows) == {names[0]: 2 * 39, names[1]: 2 * 20}
    assert all(row["domain"] == row["data"] for row in rows)
    for layer in one.layers:
        load = Counter(expert for row in rows if row["layer"] == layer.layer for expert in row["experts"])
        assert [load[expert] for expert in range(8)] == layer.load
        assert 0 < layer.more["domain_nmi"] < 1
