"""Figures that are computed from records and evaluations, against values worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moe_train.lab.measures import (
    alarms,
    alarms_on_at_end,
    measured_flops,
    published_metrics,
    starts,
    throughput,
    training_mean,
)
from moe_train.training.account import active_parameters, flops_per_token
from moe_train.training.run_config import load_run_config


def test_flops_are_counted_with_the_measured_number_of_experts() -> None:
    """Where k is fixed nothing changes; a gate without a bound was counted with all experts."""
    fixed = load_run_config("tiny")
    assert measured_flops(fixed, 2.0) == flops_per_token(fixed).total
    free = load_run_config("tiny", ["parts.router=dynamic_k_free"])
    expert = 3 * 2 * 3 * 64 * 32 * fixed.model.num_layers
    assert measured_flops(free, 8.0) - measured_flops(free, 2.5) == pytest.approx(5.5 * expert)
    assert measured_flops(free, 8.0) == flops_per_token(free).total
    dense = dataclasses.replace(load_run_config("qwen3_0.6b"))
    assert measured_flops(dense, None) == flops_per_token(dense).total


def test_active_parameters_are_counted_with_the_measured_number_of_experts() -> None:
    config = load_run_config("tiny", ["parts.router=dynamic_k_free"])
    expert = 3 * 64 * 32 * config.model.num_layers
    assert active_parameters(config, 8.0) == active_parameters(config)
    assert active_parameters(config) - active_parameters(config, 2.5) == 5.5 * expert
    dense = load_run_config("qwen3_0.6b")
    assert active_parameters(dense, None) == active_parameters(dense)


def records(*points: tuple[int, int, float]) -> list[dict[str, Any]]:
    return [{"step": step, "tokens": tokens, "tokens_per_second": speed} for step, tokens, speed in points]


def test_throughput_leaves_out_the_first_interval() -> None:
    found = records((10, 100, 1.0), (20, 300, 200.0), (30, 700, 100.0))
    assert throughput(found) == pytest.approx(600 / 5.0)
    assert throughput(found[:1]) == 1.0
    assert throughput([]) is None


def test_throughput_leaves_out_the_first_interval_after_every_start() -> None:
    """Steps 11 to 20 and 31 to 40 are those of new processes."""
    found = records((10, 100, 1.0), (20, 200, 1.0), (30, 300, 50.0), (40, 400, 1.0), (50, 600, 100.0))
    assert throughput(found, {0, 10, 30}) == pytest.approx(300 / 4.0)
    assert throughput(found, {0, 15, 30, 50, 77}) == pytest.approx(300 / 4.0), "a start that recorded nothing"
    assert throughput(found[:2], {0, 10}) == pytest.approx(1.0), "there is no other interval"


def test_starts_are_those_of_the_environment_and_where_a_stop_wrote_a_record() -> None:
    found = records((10, 1, 1.0), (20, 2, 1.0), (23, 3, 1.0), (30, 4, 1.0), (37, 5, 1.0))
    environment = {"after_step": 20, "earlier": [{"after_step": 0}, {"commit": "of an earlier version"}]}
    assert starts(environment, found, 10) == {0, 20, 23, 37}
    assert starts({}, found[:2], 10) == {0}


def test_drops_of_training_are_weighted_by_tokens() -> None:
    found = [
        {"tokens": 100, "balance/drop_rate": 0.5},
        {"tokens": 200, "balance/drop_rate": None},
        {"tokens": 500, "balance/drop_rate": 0.1},
    ]
    assert training_mean(found, "drop_rate") == pytest.approx((100 * 0.5 + 300 * 0.1) / 400)
    assert training_mean([{"tokens": 5}], "drop_rate") is None
    assert training_mean([], "mean_k") is None


def test_published_meters_are_averaged_over_layers_where_all_have_them() -> None:
    def layer(gini: float, unmasked: dict[str, float] | None) -> dict[str, Any]:
        return {"moving_average_of_lpr": {"masked": {"gini": gini, "min_max": 0.0}, "unmasked": unmasked}}

    evaluation = {
        "layers": [layer(0.2, {"gini": 0.3, "min_max": 1e-9}), layer(0.6, {"gini": 0.5, "min_max": 3e-9})],
        "documents": {"loss_batch_average": 3.5, "perplexity_batch_average": 33.1},
    }
    found = published_metrics(evaluation)
    assert found["loss_batch_average"] == 3.5 and found["perplexity_batch_average"] == 33.1
    assert found["meter_gini_masked"] == pytest.approx(0.4) and found["meter_min_max_masked"] == 0.0
    assert found["meter_gini_unmasked"] == pytest.approx(0.4)
    assert found["meter_min_max_unmasked"] == pytest.approx(2e-9)
    some = published_metrics({"layers": [layer(0.2, None), layer(0.6, {"gini": 0.5, "min_max": 0.1})]})
    assert some["meter_gini_unmasked"] is None and some["meter_gini_masked"] == pytest.approx(0.4)
    assert set(published_metrics({"layers": [{"layer": 0}]}).values()) == {None}
    assert set(published_metrics({"layers": []}).values()) == {None}


def alarm(state: str, cause: str, layer: int, step: int, began: int | None = None) -> dict[str, object]:
    known = {} if began is None else {"began": began}
    return {"kind": "alarm", "state": state, "cause": cause, "layer": layer, "step": step, **known}


def test_alarms_that_began_are_counted() -> None:
    """Each layer once, however often it rang there."""
    records = [
        alarm("began", "entropy", 0, 120),
        alarm("ended", "entropy", 0, 150, began=120),
        alarm("began", "entropy", 0, 160),
        alarm("began", "entropy", 2, 160),
    ]
    assert alarms(records) == {"entropy": 2}
    assert alarms([]) == {}


def test_alarms_that_are_on_at_the_end() -> None:
    records = [
        alarm("began", "entropy", 0, 120),
        alarm("began", "load_share", 0, 120),
        alarm("began", "load_share", 1, 130),
        alarm("ended", "load_share", 1, 150, began=130),
        alarm("ended", "entropy", 0, 150, began=120),
        alarm("began", "load_share", 1, 190),
        alarm("began", "load_share", 2, 190),
        alarm("ended", "load_share", 2, 300, began=190),
    ]
    assert alarms_on_at_end(records, {0}, steps=300, window=20) == {"entropy": 0, "load_share": 2}
    assert alarms_on_at_end(records, {0, 300}, steps=300, window=20) == {"entropy": 0, "load_share": 2}
    assert alarms_on_at_end([], {0}, steps=300, window=20) == {}
    # By name, as a file that is compared with an earlier one needs it: sets have another order in each process.
    causes = [alarm("began", cause, 0, 120) for cause in ("z_growth", "load_share", "entropy", "dead_experts")]
    assert list(alarms_on_at_end(causes, {0}, steps=300, window=20) or {}) == sorted(r["cause"] for r in causes)


def test_what_was_on_before_the_last_start_counts_only_if_it_was_said_again() -> None:
    """Processes know nothing of alarms before them. What they had no time for is not known."""
    before = [alarm("began", "entropy", 0, 120), alarm("began", "entropy", 1, 130)]
    again = [*before, alarm("began", "entropy", 1, 220)]
    assert alarms_on_at_end(again, {0, 200}, steps=300, window=20) == {"entropy": 1}
    assert alarms_on_at_end(before, {0, 200}, steps=300, window=20) == {"entropy": 0}
    assert alarms_on_at_end(before, {0, 290}, steps=300, window=20) is None
    over = [*before, alarm("ended", "entropy", 0, 160, began=120), alarm("ended", "entropy", 1, 170, began=130)]
    assert alarms_on_at_end(over, {0, 290}, steps=300, window=20) == {"entropy": 0}
