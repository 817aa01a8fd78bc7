from __future__ import annotations

from moe_train.checkpoint.retention import Retention, Saved, obsolete

HOUR = 3600.0


def saves(*steps: int, apart: float = 60.0) -> list[Saved]:
    return [Saved(step, number * apart) for number, step in enumerate(steps)]


def test_the_newest_stay() -> None:
    assert obsolete(saves(10, 20, 30, 40), Retention(newest=2)) == [10, 20]
    assert obsolete(saves(10), Retention(newest=2)) == []
    assert obsolete([], Retention()) == []


def test_newest_is_by_time_where_a_run_went_back() -> None:
    """Steps 30 and 40 were taken before the run went back to 10."""
    assert obsolete(saves(10, 30, 40, 20), Retention(newest=1)) == [10, 30, 40]


def test_multiples_stay() -> None:
    assert obsolete(saves(50, 100, 150, 200, 250), Retention(newest=1, every_steps=100)) == [50, 150]


def test_one_of_each_period_stays() -> None:
    """Saved every 20 minutes: the first of each hour."""
    found = saves(*range(1, 9), apart=HOUR / 3)
    assert obsolete(found, Retention(newest=1, every_hours=1.0)) == [2, 3, 5, 6]
    assert obsolete(found, Retention(newest=2, every_hours=2.0)) == [2, 3, 4, 5, 6]


def test_rules_add_up_and_are_stable() -> None:
    """What a rule keeps it keeps again after the others have gone."""
    rules = Retention(newest=2, every_steps=6, every_hours=1.0)
    kept: list[Saved] = []
    for number in range(1, 40):
        kept.append(Saved(number, number * HOUR / 4))
        gone = set(obsolete(kept, rules))
        assert number not in gone
        kept = [one for one in kept if one.step not in gone]
    steps = [one.step for one in kept]
    assert set(range(6, 40, 6)) <= set(steps) and {38, 39} <= set(steps)
    assert [step for step in steps if step % 4 == 1] == list(range(1, 40, 4))
