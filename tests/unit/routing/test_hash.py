from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from moe_train.routing import HashGate, HashOptions


def routed(gate, batch):
    return gate(torch.zeros(batch.ids_T.numel(), 4), batch)


@pytest.mark.parametrize("k", [1, 3])
def test_experts_follow_from_the_id_alone(k, make_batch, fresh_seed):
    batch = make_batch([9, 5], 9)
    ids_T = torch.randint(0, 50, (18,))
    gate = HashGate(4, 8, HashOptions(50, k, seed=2))
    routing = routed(gate, replace(batch, ids_T=ids_T))
    table = gate.table.tolist()
    for t, token in enumerate(ids_T.tolist()):
        want = set() if batch.padding_T[t] else set(table[token])
        assert {e for e in range(8) if routing.selected_TE[t, e]} == want
        assert routing.weights_TE[t].tolist() == pytest.approx([1 / k if e in want else 0.0 for e in range(8)])


def test_ids_beyond_the_table_take_a_row_of_it(make_batch):
    batch = make_batch([6], 6)
    gate = HashGate(4, 8, HashOptions(10))
    ids_T = torch.tensor([3, 9, 0, 5, 7, 1])
    first = routed(gate, replace(batch, ids_T=ids_T)).selected_TE
    for shift in (10, 10 * 2**40, -10):
        assert torch.equal(first, routed(gate, replace(batch, ids_T=ids_T + shift)).selected_TE)


def test_a_number_gives_all_layers_one_table_and_null_each_its_own():
    one, two = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    fixed, own = HashGate(4, 8, HashOptions(100, seed=7)), HashGate(4, 8, HashOptions(100))
    assert torch.equal(fixed.initial("table", (100, 1), one), fixed.table)
    assert torch.equal(fixed.initial("table", (100, 1), two), fixed.table)
    assert not torch.equal(own.initial("table", (100, 1), one), own.initial("table", (100, 1), two))
    assert own.initial("something", (1,), one) is None


def test_counts_make_the_load_even_and_a_missing_file_is_the_trainers_affair(tmp_path):
    path = tmp_path / "counts.json"
    counts = [1000 // (rank + 1) for rank in range(60)]
    path.write_text(json.dumps(counts))
    gate = HashGate(4, 4, HashOptions(64, counts=str(path)))
    table = gate.initial("table", (64, 1), torch.Generator().manual_seed(1)).long()
    load = [sum(c for v, c in enumerate(counts) if table[v, 0] == e) for e in range(4)]
    assert max(load) - min(load) <= 50 < max(counts) // 10
    assert gate.initial_files == (str(path),)
    path.unlink()
    assert gate.initial("table", (64, 1), torch.Generator()).unique().tolist() == [0, 1, 2, 3]


def test_the_table_stays_whole_numbers_in_bfloat16():
    gate = HashGate(4, 300, HashOptions(1000, seed=1))
    table = gate.table.clone()
    assert gate.bfloat16().table.dtype == torch.int64 and torch.equal(gate.table, table)
    assert "table" in gate.state_dict()


@pytest.mark.parametrize("options", [{"vocab_size": 0}, {"top_k": 0}, {"counts": ""}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="vocab_size|top_k|counts"):
        HashOptions(**options)


def test_more_experts_per_token_than_there_are():
    with pytest.raises(ValueError, match="only 2 experts"):
        HashGate(4, 2, HashOptions(top_k=3))
