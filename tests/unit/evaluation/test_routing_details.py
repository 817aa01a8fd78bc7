"""Details of routing against plain loops over tokens, for any composition of batches and any number of ranks.

Suffixes: N samples, S tokens per sample, B sequences of a batch, T = S * B, E experts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_train.data.batches import Batch
from moe_train.evaluation import routing_details
from moe_train.evaluation.result import EvaluationResult, LayerResult
from moe_train.evaluation.routing_details import RoutingDetails
from moe_train.evaluation.stability import RoutingStability
from moe_train.routing.balanced_gate import BalancedGate
from moe_train.routing.interface import Gate, Routing, TokenBatch
from moe_train.routing.options import RouterOptions
from moe_train.routing.registry import blank_gate

N, S, E, L = 8, 5, 6, 2


class Data:
    """Samples of uneven length whose routing depends on the token only; padding holds what must not count."""

    def __init__(self, seed: int | None = None) -> None:
        seed = int(torch.randint(0, 2**31, ())) if seed is None else seed
        print("seed", seed)
        generator = torch.Generator().manual_seed(seed)
        self.length_N = torch.randint(1, S + 1, (N,), generator=generator)
        self.logits_LNSE = torch.randn(L, N, S, E, generator=generator)
        self.selected_LNSE = torch.rand(L, N, S, E, generator=generator) < 0.4
        self.real_NS = torch.arange(S) < self.length_N[:, None]

    def batch(self, samples: Sequence[int], rows: int) -> Batch:
        missing = rows - len(samples)
        real_BS = torch.cat([self.real_NS[list(samples)], torch.zeros(missing, S, dtype=torch.bool)])
        zeros_BS = torch.zeros(rows, S, dtype=torch.int64)
        return Batch(zeros_BS, zeros_BS, real_BS, ~real_BS, torch.tensor([*samples, *[-1] * missing]))

    def forward(self, batch: Batch) -> tuple[Tensor, list[Routing]]:
        rows = batch.sample_B.clamp(min=0)
        routings = []
        for layer in range(L):
            logits_TE = self.logits_LNSE[layer, rows].transpose(0, 1).reshape(-1, E)
            selected_TE = self.selected_LNSE[layer, rows].transpose(0, 1).reshape(-1, E)
            probs_TE = torch.softmax(logits_TE, -1)
            routings.append(Routing(logits_TE, probs_TE, probs_TE * selected_TE, selected_TE, selected_TE))
        return torch.zeros(batch.ids_BS.shape), routings

    def watch(self, watcher: Any, batches: Sequence[Batch]) -> None:
        forward = watcher.watch(self.forward)
        for batch in batches:
            forward(batch)

    def layers(self, batches: Sequence[Batch], gate: Gate | None = None) -> list[dict[str, Any]]:
        details = RoutingDetails(gate or blank_gate("softmax_topk", {"top_k": 2}, E), L, E)
        self.watch(details, batches)
        return [layer.more for layer in details.add_to(result(), lambda x: x).layers]


def result() -> EvaluationResult:
    layers = [LayerResult(i, {"gini": 0.1}, 0.01, [1] * E, [1] * E) for i in range(L)]
    return EvaluationResult(loss=1.0, tokens=1, bytes=None, bits_per_byte=None, routed_tokens=1, layers=layers)


def test_against_loops() -> None:
    data = Data()
    found = data.layers([data.batch(range(N), N)])
    for layer in range(L):
        histogram, pairs, soft = [0] * (E + 1), [[0] * E for _ in range(E)], [0.0] * E
        entropies, margins = [], []
        for n in range(N):
            for s in range(int(data.length_N[n])):
                logits = data.logits_LNSE[layer, n, s].double().tolist()
                chosen = data.selected_LNSE[layer, n, s].nonzero().flatten().tolist()
                total = sum(math.exp(x) for x in logits)
                probs = [math.exp(x) / total for x in logits]
                histogram[len(chosen)] += 1
                for a in chosen:
                    soft[a] += probs[a]
                    for b in chosen:
                        pairs[a][b] += 1
                entropies.append(-sum(p * math.log(p) for p in probs) / math.log(E))
                if 0 < len(chosen) < E:
                    others = [logits[e] for e in range(E) if e not in chosen]
                    margins.append(min(logits[e] for e in chosen) - max(others))
        more = found[layer]
        while histogram[-1] == 0:
            histogram.pop()
        assert more["k_histogram"] == histogram and more["coactivation"] == pairs
        assert more["soft_load"] == pytest.approx(soft, rel=1e-5)
        assert more["router_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
        assert more["router_margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-5)
        loads = data.selected_LNSE[layer][data.real_NS].sum(0).tolist()
        assert [more["coactivation"][e][e] for e in range(E)] == loads


@pytest.mark.parametrize("size", [1, 3, 10])
def test_any_composition(size: int) -> None:
    """Row 5: neither padding nor rows that only fill a batch change anything. The moving averages go by micro-batch."""
    data = Data()
    whole = data.layers([data.batch(range(N), N)])
    parts = data.layers([data.batch(range(i, min(i + size, N)), size) for i in range(0, N, size)])
    for a, b in zip(whole, parts, strict=True):
        for key in ("k_histogram", "coactivation"):
            assert a[key] == b[key]
        for key in ("soft_load", "router_entropy", "router_margin"):
            assert a[key] == pytest.approx(b[key], rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_in_turn_find_the_same(ranks: int) -> None:
    data = Data()
    batches = [data.batch([n], 1) for n in range(N)]
    [*whole] = data.layers(batches)
    gate = blank_gate("softmax_topk", {"top_k": 2}, E)
    handed: list[list[Tensor]] = []
    for rank in range(ranks):
        details = RoutingDetails(gate, L, E, rank=rank, ranks=ranks)
        data.watch(details, batches[rank::ranks])
        calls: list[Tensor] = []
        details.add_to(result(), lambda x, calls=calls: calls.append(x.clone()) or x)  # type: ignore[misc]
        handed.append(calls)
    totals = iter([torch.stack(tensors).sum(0) for tensors in zip(*handed, strict=True)])
    more = [layer.more for layer in RoutingDetails(gate, L, E).add_to(result(), lambda _: next(totals)).layers]
    for a, b in zip(whole, more, strict=True):
        assert a["coactivation"] == b["coactivation"] and a["k_histogram"] == b["k_histogram"]
        assert a["moving_average_of_lpr"]["masked"] == pytest.approx(b["moving_average_of_lpr"]["masked"])
        assert a["moving_average_of_lpr"]["unmasked"] == pytest.approx(b["moving_average_of_lpr"]["unmasked"])


def test_the_published_meter_counts_padding_and_not_filler() -> None:
    data = Data(0)
    data.length_N[:] = S
    data.length_N[3] = 1
    data.real_NS = torch.arange(S) < data.length_N[:, None]
    batches = [data.batch([0, 1], 2), data.batch([2, 3], 2), data.batch([4], 2)]
    for layer, more in enumerate(data.layers(batches)):
        meter = more["moving_average_of_lpr"]
        masked, unmasked = [0.0] * E, [0.0] * E
        for rows in ([0, 1], [2, 3], [4]):
            load = data.selected_LNSE[layer, rows][data.real_NS[rows]].sum(0).tolist()
            pads = data.logits_LNSE[layer, rows][~data.real_NS[rows]].topk(2, -1).indices.flatten().tolist()
            for e in range(E):
                masked[e] = 0.99 * masked[e] + 0.01 * load[e]
                unmasked[e] = 0.99 * unmasked[e] + 0.01 * (load[e] + pads.count(e))
        assert meter["masked"]["min_max"] == pytest.approx(min(masked) / max(masked))
        assert meter["unmasked"]["min_max"] == pytest.approx(min(unmasked) / max(unmasked))
        assert meter["masked"]["gini"] != pytest.approx(meter["unmasked"]["gini"], abs=1e-9)


def test_what_a_gate_does_not_have_is_null() -> None:
    class Table(Gate):
        takes_switch_loss = takes_z_loss = reads_hidden = False

    data = Data()
    [more, _] = data.layers([data.batch(range(N), N)], Table(4, E))
    assert more["router_entropy"] is None and more["router_margin"] is None
    assert more["moving_average_of_lpr"]["unmasked"] is None and more["coactivation"]
    any_k = data.layers([data.batch(range(N), N)], blank_gate("dynamic_k", {}, E))[0]
    assert any_k["moving_average_of_lpr"]["unmasked"] is None and any_k["router_entropy"] is not None


def test_numbers_join_the_mean_and_large_matrices_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_details, "MAX_PAIRS", L * E * E - 1)
    data = Data()
    details = RoutingDetails(blank_gate("softmax_topk", {"top_k": 2}, E), L, E)
    data.watch(details, [data.batch(range(N), N)])
    found = details.add_to(result(), lambda x: x).to_json()
    assert [layer["coactivation"] for layer in found["layers"]] == [None] * L
    entropies = [layer["router_entropy"] for layer in found["layers"]]
    assert found["mean"]["router_entropy"] == pytest.approx(sum(entropies) / L)
    assert found["over_layers"]["router_entropy"]["max"] == max(entropies)
    assert "coactivation" not in found["mean"]


def test_stability_against_loops() -> None:
    one, two = Data(), Data()
    two.length_N, two.real_NS = one.length_N, one.real_NS
    watcher = RoutingStability(two.forward, L, E)
    one.watch(watcher, [one.batch([0, 1, 2], 4), one.batch(range(3, N), 8)])
    found = watcher.to_json([3, 7], lambda x: x)
    for layer in range(L):
        common, slots, jaccard, loads = 0, 0, [], [[0] * E, [0] * E]
        for n in range(N):
            for s in range(int(one.length_N[n])):
                a, b = (set(d.selected_LNSE[layer, n, s].nonzero().flatten().tolist()) for d in (one, two))
                common += len(a & b)
                slots += len(a) + len(b)
                jaccard += [len(a & b) / len(a | b)] if a | b else []
                for load, chosen in zip(loads, (a, b), strict=True):
                    for e in chosen:
                        load[e] += 1
        row = found["layers"][layer]
        tokens = int(one.length_N.sum())
        assert row["layer"] == (3, 7)[layer] and row["same_slots"] == pytest.approx(2 * common / slots)
        assert row["jaccard"] == pytest.approx(sum(jaccard) / len(jaccard))
        chance = sum(x * y for x, y in zip(*loads, strict=True)) / tokens
        assert row["same_by_chance"] == pytest.approx(2 * chance / slots)
    assert found["mean"]["jaccard"] == pytest.approx(sum(row["jaccard"] for row in found["layers"]) / L)


def test_the_same_checkpoint_is_the_same() -> None:
    data = Data()
    watcher = RoutingStability(data.forward, L, E)
    data.watch(watcher, [data.batch(range(N), N)])
    mean = watcher.to_json(range(L), lambda x: x)["mean"]
    assert mean["same_slots"] == 1 and mean["jaccard"] == 1 and mean["same_by_chance"] < 1


def test_padding_is_metered_by_its_own_hidden_states() -> None:
    """As published code meters it: the gate must see what stands there (zeros would send all of it to one expert)."""
    torch.manual_seed(3)
    gate = BalancedGate(RouterOptions("softmax_topk", {"top_k": 2}), 8, 6)
    padding_T = torch.tensor([False, False, True, True, True])
    batch = TokenBatch(
        ids_T=torch.zeros(5, dtype=torch.int64), sample_T=torch.zeros(5, dtype=torch.int64),
        position_T=torch.arange(5), padding_T=padding_T, sequence_length=5, batch_size=1,
    )  # fmt: skip
    tokens_TH = torch.randn(5, 8)
    routing = gate.eval()(tokens_TH, batch)
    torch.testing.assert_close(routing.logits_TE, tokens_TH @ gate.gate.weight.t())
    assert not routing.selected_TE[padding_T].any()
