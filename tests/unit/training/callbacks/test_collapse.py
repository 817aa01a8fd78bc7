"""The collapse alarm: each cause once per layer, with numbers; silent for what chance does."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.training.callbacks.alarms import alarms
from moe_train.training.callbacks.base import Callback, Callbacks, Record, RunInfo
from moe_train.training.callbacks.collapse import CollapseAlarm
from moe_train.training.callbacks.console import console_line
from moe_train.training.callbacks.layer_watch import LayerWatch
from moe_train.training.callbacks.tags import scalar_tags
from moe_train.training.options import AlarmOptions
from moe_train.training.run_config import RunConfig
from moe_train.training.step import NO_REQUESTS, StepResult

E = 8
EVEN = [100] * E


def step_of(*loads: list[int], z: float | None = 4.0, tokens: int | None = None) -> StepResult:
    load_LE = torch.tensor(loads, dtype=torch.int64)
    count = sum(loads[0]) if tokens is None else tokens
    layers = list(range(len(loads)))
    return StepResult(1.0, 1, count, layers, load_LE, load_LE, [{} for _ in loads], [z] * len(loads), NO_REQUESTS)


def run(alarm: CollapseAlarm, steps: list[StepResult], first: int = 1) -> list[Record]:
    return [record for number, step in enumerate(steps, first) for record in alarm.on_step(number, step)]


def alarm(**options: Any) -> CollapseAlarm:
    return CollapseAlarm(AlarmOptions(**{"quiet_steps": 0, **options}), stream=io.StringIO())


def brief(records: list[Record]) -> list[tuple[int, int, str, str]]:
    return [(r["step"], r["layer"], r["cause"], r["state"]) for r in records]


def test_a_dead_expert_rings_after_20_steps_once_and_ends() -> None:
    dead = [0, *EVEN[1:]]
    watched = alarm(load_share=0)
    records = run(watched, [step_of(EVEN, dead)] * 60 + [step_of(EVEN, EVEN)] * 30)
    assert brief(records) == [(20, 1, "dead_experts", "began"), (80, 1, "dead_experts", "ended")]
    assert records[0]["experts"] == [0] and "expert 0 got no token in the last 20 steps" in records[0]["message"]
    assert [r["layers_on"] for r in records] == [1, 0] and records[1]["began"] == 20


def test_nineteen_silent_steps_are_no_alarm() -> None:
    dead = [0, *EVEN[1:]]
    assert not run(alarm(load_share=0), ([step_of(dead)] * 19 + [step_of(EVEN)]) * 5)


def test_a_small_share() -> None:
    small = [35, *[101] * 7]
    records = run(alarm(), [step_of(small)] * 30)
    assert brief(records) == [(20, 0, "load_share", "began")]
    assert records[0]["value"] == pytest.approx(35 * 8 / sum(small)) and records[0]["experts"] == [0]
    assert not run(alarm(), [step_of([42, *EVEN[1:]])] * 30), "above 0.4 of an even share"
    assert not run(alarm(load_share=0), [step_of(small)] * 30), "switched off"


def test_low_entropy() -> None:
    skewed = [10_000, *[1100] * 7]  # no expert below 0.4 / E
    records = run(alarm(entropy=0.8), [step_of(skewed)] * 25)
    assert brief(records) == [(20, 0, "entropy", "began")] and records[0]["value"] == pytest.approx(0.7364, abs=1e-3)
    assert not run(alarm(), [step_of(skewed)] * 25), "0.7 by default"


def test_z_tenfold_within_100_steps() -> None:
    slow = [step_of(EVEN, z=10.0 * 10 ** (i / 150)) for i in range(300)]
    assert not run(alarm(), slow)
    fast = [step_of(EVEN, z=10.0 * 10 ** (i / 90)) for i in range(95)]
    records = run(alarm(), fast)
    assert brief(records) == [(91, 0, "z_growth", "began")]
    assert records[0]["value"] == pytest.approx(100) and records[0]["lowest"] == pytest.approx(10)
    assert not run(alarm(z_growth=0), fast)


def test_z_near_zero_or_absent_is_no_alarm() -> None:
    """logsumexp of E zeros is ln E: a rise from nearly nothing to that level is what training begins with."""
    assert not run(alarm(), [step_of(EVEN, z=1e-9), step_of(EVEN, z=4.0), step_of(EVEN, z=40.0)])
    assert not run(alarm(), [step_of(EVEN, z=None)] * 50)
    assert brief(run(alarm(), [step_of(EVEN, z=1e-9), step_of(EVEN, z=44.0)])) == [(2, 0, "z_growth", "began")]


def test_quiet_steps_are_not_judged() -> None:
    dead = [0, *EVEN[1:]]
    watched = alarm(quiet_steps=100, load_share=0)
    assert not run(watched, [step_of(dead)] * 119)
    assert brief(run(watched, [step_of(dead)], first=120)) == [(120, 0, "dead_experts", "began")]


@pytest.mark.parametrize(("slots", "experts"), [(4, 8), (16, 64), (256, 128)])
def test_even_random_routing_with_few_tokens_is_silent(slots: int, experts: int) -> None:
    """Single steps have experts without a slot by chance: windows grow until that is as good as impossible."""
    seed = int(torch.randint(0, 2**31, ()))
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    watch = LayerWatch(AlarmOptions(), torch.full((experts,), 1 / experts))
    starved = 0
    for _ in range(1500):
        load_E = torch.bincount(torch.randint(0, experts, (slots,), generator=generator), minlength=experts)
        starved += bool((load_E == 0).any())
        assert watch.add(load_E, slots, None) == {}
    assert starved > 100


def test_a_dead_expert_is_found_also_in_small_steps() -> None:
    watch = LayerWatch(AlarmOptions(load_share=0), torch.full((4,), 0.25))
    found = [watch.add(torch.tensor([0, 1, 1, 1]), 3, None) for _ in range(140)]
    assert [bool(f) for f in found].index(True) == 133, "134 steps of 3 slots: 100 for each expert"


def test_a_layer_that_gives_no_slot_at_all() -> None:
    """As a gate with sparsity of its own may come to do. Its tokens say that slots were to be expected."""
    records = run(alarm(), [step_of([0] * E, tokens=800)] * 25)
    assert brief(records) == [(20, 0, "dead_experts", "began")] and records[0]["experts"] == list(range(E))
    assert not run(alarm(), [step_of([0] * E, tokens=0)] * 50), "and without tokens there is nothing to say"


def test_wanted_shares_are_the_measure() -> None:
    target = [0.3, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.7]
    load = [round(1000 * share) for share in target]
    assert brief(run(alarm(), [step_of(load)] * 25)) == [(20, 0, "load_share", "began")]
    wanted = CollapseAlarm(AlarmOptions(quiet_steps=0), target_load=target, stream=io.StringIO())
    assert not run(wanted, [step_of(load)] * 25)


def test_any_number_of_experts_per_token() -> None:
    """dynamic_k and dense gates: shares are of slots, whatever their number per token."""
    for k in (1, 3, E):
        assert not run(alarm(), [step_of([k * 50] * E, tokens=50 * E)] * 40)
    assert not run(alarm(), [step_of([100])] * 40), "one expert cannot be unbalanced"


def test_a_mistake_of_the_alarm_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    broken = alarm()
    bad = StepResult(1.0, 1, 8, [0], torch.zeros(1, 0), torch.zeros(1, 0), [{}], [None], NO_REQUESTS)
    assert run(broken, [bad, step_of(EVEN)]) == []
    assert capsys.readouterr().err.count("the collapse alarm is off from step 1 on") == 1


def test_records_reach_all_callbacks_and_the_end_counts_them() -> None:
    class Keeper(Callback):
        def __init__(self) -> None:
            self.records: list[Record] = []

        def on_record(self, record: Record) -> None:
            self.records.append(record)

    keeper, watched = Keeper(), alarm()
    watched.advice = {"dead_experts": "this"}
    callbacks = Callbacks([keeper, watched])
    for number in range(1, 31):
        callbacks.on_step(number, step_of([0, *EVEN[1:]], [0, *EVEN[1:]]))
    assert brief(keeper.records) == [(20, 0, "dead_experts", "began"), (20, 1, "dead_experts", "began")]
    lines = [console_line(record, RunInfo("r", Path(), 100)) for record in keeper.records]
    assert lines[0].startswith("step  20/100 | ALARM | layer 0: expert 0 got no token") and "Try this" in lines[0]
    assert "Try" not in lines[1] and keeper.records[1]["advice"] == "this", "said once, recorded each time"
    assert scalar_tags(keeper.records[1]) == {"alarm/dead_experts": 2}
    callbacks.on_end("finished")
    assert watched.stream.getvalue() == "collapse alarm: 2 (dead_experts 2); 2 still on\n"  # type: ignore[attr-defined]


def test_the_end_says_that_it_was_quiet() -> None:
    quiet, unjudged = alarm(), alarm(quiet_steps=100)
    for watched in (quiet, unjudged):
        run(watched, [step_of(EVEN)] * 5)
        watched.on_end("finished")
    assert quiet.stream.getvalue() == "collapse alarm: quiet\n"  # type: ignore[attr-defined]
    assert unjudged.stream.getvalue() == ""  # type: ignore[attr-defined]


def test_the_option_switches_it_off() -> None:
    assert len(alarms(RunConfig())) == 1
    assert alarms(RunConfig(alarm=AlarmOptions(enabled=False))) == []
