from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from moe_train.training.guard.policy import Policy
from moe_train.training.options import GuardOptions


def verdicts(policy: Policy, losses: list[float], finite: bool = True, rewinds: int = 0) -> list[str]:
    return [policy.judge(loss, finite=finite, rewinds=rewinds).action for loss in losses]


@pytest.mark.parametrize("action", ["skip", "rewind", "stop"])
@pytest.mark.parametrize(
    ("loss", "finite", "cause"), [(math.nan, True, "loss"), (math.inf, False, "loss"), (2.0, False, "gradient")]
)
def test_numbers_that_are_not_finite(action: Any, loss: float, finite: bool, cause: str) -> None:
    verdict = Policy(GuardOptions(non_finite=action)).judge(loss, finite=finite, rewinds=0)
    assert (verdict.action, verdict.cause) == (action, cause)
    assert ("gradient" if cause == "gradient" else f"the loss is {loss}") in verdict.reason


@pytest.mark.parametrize("action", ["ignore", "warn", "skip", "rewind", "stop"])
def test_a_spike(action: Any) -> None:
    policy = Policy(GuardOptions(spike=action, window=4, threshold=5.0))
    assert verdicts(policy, [2.0, 2.1, 1.9, 2.0]) == ["take"] * 4
    verdict = policy.judge(9.0, finite=True, rewinds=0)
    assert verdict.action == ("take" if action == "ignore" else action)
    if action != "ignore":
        assert verdict.cause == "spike" and verdict.median == 2.0 and (verdict.score or 0) > 5
        assert "9.0000" in verdict.reason and "2.0000" in verdict.reason
    # What is not trained on is no measure for what comes.
    assert (9.0 in policy.losses.values) == (action in ("ignore", "warn"))
    assert policy.warned == (action == "warn")


def test_a_loss_that_falls_is_no_spike() -> None:
    policy = Policy(GuardOptions(spike="stop", window=4, threshold=3.0))
    assert verdicts(policy, [5.0, 5.01, 5.0, 4.99, 1.0, 0.5]) == ["take"] * 6


def test_a_level_that_stays_is_learned_by_warnings() -> None:
    policy = Policy(GuardOptions(spike="warn", window=5, threshold=5.0))
    verdicts(policy, [2.0, 2.1, 1.9, 2.05, 1.95])
    found = verdicts(policy, [4.0, 4.1, 3.9, 4.05, 3.95, 4.0])
    assert found[0] == "warn" and found[-1] == "take" and found == sorted(found, reverse=True)


def test_skips_in_a_row_are_bounded() -> None:
    policy = Policy(GuardOptions(max_in_a_row=2))
    nan = math.nan
    assert verdicts(policy, [1.0, nan, nan, 1.0, nan, nan, nan]) == [
        *("take", "skip", "skip", "take", "skip", "skip", "stop")
    ]
    assert policy.skipped == 4


def test_skips_of_the_run_are_bounded() -> None:
    policy = Policy(GuardOptions(max_skips=2))
    assert verdicts(policy, [math.nan, 1.0, math.nan, 1.0, math.nan]) == ["skip", "take", "skip", "take", "stop"]
    assert verdicts(Policy(GuardOptions(max_skips=0)), [math.nan]) == ["stop"]


def test_rewinds_are_bounded() -> None:
    options = GuardOptions(non_finite="rewind", max_rewinds=2)
    assert verdicts(Policy(options), [math.nan], rewinds=1) == ["rewind"]
    verdict = Policy(options).judge(math.nan, finite=False, rewinds=2)
    assert verdict.action == "stop" and "guard.max_rewinds = 2" in verdict.reason


def test_a_resumed_policy_decides_alike() -> None:
    """Through the JSON of a checkpoint, at any step."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    generator = random.Random(seed)
    options = GuardOptions(spike="skip", window=10, threshold=4.0, max_in_a_row=3, max_skips=10**6)
    steps = [
        (math.nan if generator.random() < 0.05 else generator.gauss(2, 0.1) * generator.choice([1] * 9 + [3]))
        for _ in range(120)
    ]
    whole = Policy(options)
    want = verdicts(whole, steps)
    assert {"take", "skip"} <= set(want)
    cut = generator.randrange(1, 119)
    first, second = Policy(options), Policy(options)
    got = verdicts(first, steps[:cut])
    second.restore(json.loads(json.dumps(first.state())))
    assert got + verdicts(second, steps[cut:]) == want
    assert second.state() == whole.state()


def test_a_checkpoint_without_a_guard() -> None:
    policy = Policy(GuardOptions())
    policy.restore({})
    assert policy.state() == Policy(GuardOptions()).state()
