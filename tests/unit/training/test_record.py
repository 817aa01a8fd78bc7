from __future__ import annotations

import math

import pytest
import torch

from moe_train.routing.statistics import balance_statistics, gini_floor
from moe_train.training.record import DeviceFacts, IntervalSums, build_eval_record, build_record, mean_losses


def sums(**changes: object) -> IntervalSums:
    values: dict[str, object] = {
        "steps": 2,
        "seconds": 4.0,
        "tokens": 1000,
        "loss_sum": 5000.0,
        "loss_count": 800,
        "layers": [0, 1],
        "load_LE": torch.tensor([[500, 500, 500, 500], [200, 400, 600, 800]]),
        "kept_LE": torch.tensor([[500, 500, 500, 500], [200, 400, 500, 500]]),
        "losses": [{"switch": (20.0, 10.0)}, {"switch": (30.0, 10.0), "z": (4.0, 8.0)}],
    }
    return IntervalSums(**(values | changes))  # type: ignore[arg-type]


def record(interval: IntervalSums, **changes: object) -> dict[str, object]:
    values: dict[str, object] = {"step": 20, "tokens": 10_000, "lr": 0.1, "grad_norm": 2.0, "memory_bytes": 7}
    return build_record(sums=interval, **(values | changes))  # type: ignore[arg-type]


def test_record_from_known_sums() -> None:
    result = record(sums())
    expected = {
        "kind": "train",
        "step": 20,
        "tokens": 10_000,
        "loss": 6.25,
        "lr": 0.1,
        "grad_norm": 2.0,
        "tokens_per_second": 250.0,
        "step_seconds": 2.0,
        "memory_bytes": 7,
        "aux/switch": 2.5,
        "aux/z": 0.5,
        "balance/gini": 0.125,
        "balance/min_max": 0.625,
        "balance/layer_1/gini": 0.25,
        "balance/layer_1/min_max": 0.25,
        "balance/layer_1/drop_rate": 0.2,
        "balance/mean_k": 2.0,
    }
    assert result["load"] == [[500, 500, 500, 500], [200, 400, 600, 800]]
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    assert "mfu" not in result


def test_row_7_logged_equals_recomputed() -> None:
    torch.manual_seed(3)
    load = torch.randint(0, 1000, (6, 16))
    kept = torch.minimum(load, torch.full_like(load, 800))
    losses = [{"switch": (float(torch.rand(())) * 64, 64.0)} for _ in range(6)]
    result = record(sums(layers=list(range(6)), load_LE=load, kept_LE=kept, losses=losses))
    assert result["aux/switch"] == pytest.approx(sum(layer["switch"][0] for layer in losses) / 64 / 6)
    for name, value in balance_statistics(load[5], kept[5], 1000).items():
        assert result[f"balance/layer_5/{name}"] == value
        mean = sum(balance_statistics(load[i], kept[i], 1000)[name] for i in range(6)) / 6
        assert result[f"balance/{name}"] == pytest.approx(mean)


def test_intervals_add_up() -> None:
    """The record of two intervals together has the loss over all their tokens, not the mean of two means."""
    first, second = sums(loss_sum=1000.0, loss_count=100), sums(loss_sum=300.0, loss_count=300)
    both = sums(loss_sum=1300.0, loss_count=400)
    assert record(both)["loss"] == pytest.approx(3.25)
    assert (record(first)["loss"] + record(second)["loss"]) / 2 == pytest.approx(5.5)  # type: ignore[operator]


def test_per_layer_tags_can_be_left_out_but_the_load_stays() -> None:
    result = record(sums(), per_layer=False)
    assert not [key for key in result if "layer_" in key]
    assert result["load"] == sums().load_LE.tolist()


def test_mfu_needs_a_known_peak() -> None:
    facts = DeviceFacts(devices=2, flops_without_experts=1e9, peak_flops=1e12)
    assert record(sums(), facts=facts)["mfu"] == pytest.approx(250 * 1e9 / 2e12)
    assert "mfu" not in record(sums(), facts=DeviceFacts(2, 1e9, 1e6, None))


def test_mfu_counts_the_slots_that_experts_computed() -> None:
    """Also where tokens have any number of experts, and where some were dropped (the gate's bound would overstate)."""
    measured = sums()
    facts = DeviceFacts(devices=2, flops_without_experts=1e9, flops_per_slot=3e8, peak_flops=1e12)
    flops = measured.tokens * 1e9 + int(measured.kept_LE.sum()) * 3e8
    assert record(measured, facts=facts)["mfu"] == pytest.approx(flops / measured.seconds / 2e12)
    assert int(measured.kept_LE.sum()) < int(measured.load_LE.sum()), "the test's own numbers drop nothing"


def test_histogram_of_experts_per_token() -> None:
    assert "k_histogram" not in record(sums())
    assert record(sums(k_histogram_LN=torch.tensor([[1, 2, 3]])))["k_histogram"] == [[1, 2, 3]]


def test_loss_without_targets_is_nan() -> None:
    assert math.isnan(record(sums(loss_sum=0.0, loss_count=0))["loss"])  # type: ignore[arg-type]


def test_mean_of_losses_is_over_the_layers_that_have_it() -> None:
    assert mean_losses([{}, {"z": (6.0, 2.0)}, {"z": (1.0, 1.0)}]) == {"z": 2.0}


def test_eval_record() -> None:
    evaluation = {"loss": 2.0, "perplexity": math.e**2, "tokens": 5, "bits_per_byte": None, "mean": {"gini": 0.1}}
    result = build_eval_record(7, evaluation)
    assert result["kind"] == "eval" and result["step"] == 7 and result["eval/loss"] == 2.0
    assert result["balance"] == {"gini": 0.1} and "eval/bits_per_byte" not in result


def test_layers_keep_their_numbers_and_without_experts_there_is_no_balance() -> None:
    result = record(sums(layers=[1, 4]))
    assert {key.split("/")[1] for key in result if key.startswith("balance/layer_")} == {"layer_1", "layer_4"}
    assert result["layers"] == [1, 4]
    nothing = torch.zeros(0, 0, dtype=torch.int64)
    dense = record(sums(layers=[], load_LE=nothing, kept_LE=nothing, losses=[]))
    assert dense["loss"] == 6.25 and not [key for key in dense if "balance" in key or key in ("load", "layers", "aux")]


def test_spread_over_layers_and_the_floor_beside_the_gini() -> None:
    """Row 38 (Megatron-LM #2398, torchtitan PR3433): percentiles over layers, and a cap on the number of tags."""
    torch.manual_seed(5)
    load = torch.randint(1, 1000, (5, 8))
    result = record(sums(layers=list(range(5)), load_LE=load, kept_LE=load, losses=[]))
    for name in ("gini", "min_max", "entropy", "dead_experts", "gini_floor"):
        values = sorted(float(result[f"balance/layer_{i}/{name}"]) for i in range(5))  # type: ignore[arg-type]
        places = ("min", "p25", "median", "p75", "max")
        assert [result[f"balance/{name}/{place}"] for place in places] == pytest.approx(values), "five layers: each"
    assert result["balance/layer_2/gini_floor"] == gini_floor(int(load[2].sum()), 8)
    single = record(sums(layers=[3], load_LE=load[:1], kept_LE=load[:1], losses=[]))
    assert "balance/layer_3/gini" in single and "balance/gini/median" not in single


def test_too_many_tags_leave_the_summary() -> None:
    everything = record(sums())
    tags = [key for key in everything if key.startswith("balance/layer_")]
    assert [key for key in record(sums(), max_layer_tags=len(tags)) if "/layer_" in key] == tags
    capped = record(sums(), max_layer_tags=len(tags) - 1)
    assert not [key for key in capped if "/layer_" in key] and capped["load"] == everything["load"]
    assert {key for key in everything if "/layer_" not in key} == set(capped)
