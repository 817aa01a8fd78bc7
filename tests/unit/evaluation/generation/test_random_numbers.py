"""Random numbers of a sequence depend on the seed and the prompt, on nothing around it."""

from __future__ import annotations

import random

import numpy as np

from moe_train.evaluation.generation.random_numbers import RandomNumbers, numbers_of


def draws(numbers: RandomNumbers, count: int = 5) -> list[float]:
    return [numbers.at(index) for index in range(count)]


def test_neighbours_and_order_do_not_matter() -> None:
    prompts = [[3, 1], [5], [3, 1, 2], [7, 7]]
    want = {tuple(prompt): draws(numbers_of(4, [prompt])[0]) for prompt in prompts}
    assert len({tuple(values) for values in want.values()}) == 4
    random.shuffle(prompts)
    for prompt, numbers in zip(prompts, numbers_of(4, prompts), strict=True):
        assert draws(numbers) == want[tuple(prompt)]


def test_equal_prompts_differ_and_seeds_do() -> None:
    first, other, second = numbers_of(1, [[3], [4], [3]])
    assert draws(first) != draws(second)
    assert [draws(n) for n in numbers_of(1, [[3], [3]])] == [draws(first), draws(second)]
    assert draws(numbers_of(2, [[3]])[0]) != draws(first)
    assert draws(numbers_of(1, [np.array([3], np.int32).tolist()])[0]) == draws(first)


def test_they_are_uniform() -> None:
    values = np.array(draws(RandomNumbers(random.randrange(2**31), [1, 2], 0), 20_000))
    assert 0 <= values.min() < 0.001 and 0.999 < values.max() < 1
    assert abs(values.mean() - 0.5) < 0.015 and abs(values.var() - 1 / 12) < 0.003
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.04
