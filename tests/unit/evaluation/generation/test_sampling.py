"""Which token comes next: against plain arithmetic, token by token."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from moe_train.evaluation.generation.options import GenerationOptions
from moe_train.evaluation.generation.sampling import candidates, choose, draw, greedy


def plain(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> dict[int, float]:
    """Token -> probability, by the definition and with Python's numbers."""
    weight = [logit / temperature for logit in logits]
    order = sorted(range(len(weight)), key=lambda token: (-weight[token], token))
    order = order[: top_k or len(order)]
    highest = weight[order[0]]
    total = sum(math.exp(weight[token] - highest) for token in order)
    probs = {token: math.exp(weight[token] - highest) / total for token in order}
    if top_p is not None and top_p < 1:
        kept, before = [], 0.0
        for token in order:
            if kept and before >= top_p:
                break
            kept.append(token)
            before += probs[token]
        share = sum(probs[token] for token in kept)
        probs = {token: probs[token] / share for token in kept}
    return probs


@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 40, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_candidates_are_those_of_the_definition(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Temperature, then top-k, then top-p of what is left. Some logits tie."""
    seed = random.randrange(2**31)
    print("seed", seed)
    logits_BV = (torch.randn(5, 50, generator=torch.Generator().manual_seed(seed)) * 3 * 4).round() / 4
    got_BV = candidates(logits_BV, GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p))
    assert got_BV.dtype == torch.float32
    compared = 0
    bounds = [] if top_p is None or top_p == 1 else [top_p - 1e-5, top_p + 1e-5]
    for logits_V, got_V in zip(logits_BV, got_BV, strict=True):
        want = plain(logits_V.tolist(), temperature, top_k, top_p)
        if len({len(plain(logits_V.tolist(), temperature, top_k, bound)) for bound in bounds}) > 1:
            continue  # a sum of probabilities lies at the bound: rounding decides
        compared += 1
        assert set(got_V.nonzero().flatten().tolist()) == {token for token, p in want.items() if p > 1e-40}
        assert max(abs(float(got_V[token]) - p) for token, p in want.items()) < 1e-5
    assert compared >= 3


def test_order_of_operations() -> None:
    """The nucleus is taken among the top-k, whose probabilities sum to one again, after the temperature."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert candidates(logits, GenerationOptions(temperature=1.0, top_p=0.55)).count_nonzero() == 2
    assert candidates(logits, GenerationOptions(temperature=1.0, top_k=2, top_p=0.55)).count_nonzero() == 1
    assert candidates(logits, GenerationOptions(temperature=9.0, top_k=2, top_p=0.55)).count_nonzero() == 2


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 7:250] = 2.0
    assert greedy(logits).tolist() == [7]
    for options in (GenerationOptions(temperature=1.0, top_k=2), GenerationOptions(temperature=1.0, top_p=1.5 / 300)):
        assert candidates(logits, options).nonzero()[:, 1].tolist() == [7, 8]


def test_temperature_0_is_greedy_and_a_low_one_nearly() -> None:
    logits = torch.randn(20, 100)
    uniform = torch.rand(20, dtype=torch.float64)
    best = logits.argmax(-1)
    logits[torch.arange(20), best] += 0.5  # 5,000 at the temperature 1e-4: the second has no share.
    assert torch.equal(choose(logits, uniform, GenerationOptions()), best)
    assert torch.equal(choose(logits.bfloat16(), uniform, GenerationOptions()), greedy(logits.bfloat16().float()))
    # Divided by the lowest of these, or times what one divided by them is, float32 overflows.
    for temperature in (1e-4, 1e-30, 1e-38, 1e-42, 1e-300, 5e-324):
        for top_k, top_p in ((None, None), (5, None), (None, 0.9), (5, 0.9)):
            options = GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p)
            assert torch.equal(choose(logits, uniform, options), best), options
            assert torch.equal(choose(logits - 100, uniform, options), (logits - 100).argmax(-1)), options
            assert torch.equal(candidates(logits, options).sum(-1), torch.ones(20)), options


def test_the_largest_are_those_before_the_division() -> None:
    """Beside a large logit the differences of small ones vanish; they do not change places for it."""
    logits = torch.tensor([[1e-9, 2e-9, 10.0]])
    for temperature in (0.5, 1.0, 1e38):
        assert candidates(logits, GenerationOptions(temperature=temperature, top_k=2))[0, 0] == 0


def test_draws_follow_the_probabilities() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0]])
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = Counter(draw(probs.expand(1000, -1), uniform).tolist())
    assert {token: count for token, count in tokens.items()} == {1: 500, 3: 200, 4: 300}


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-48])
def test_the_ends_of_the_random_numbers_draw_what_may_be_drawn(uniform: float) -> None:
    seed = random.randrange(2**31)
    print("seed", seed)
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(seed)) * 5
    options = GenerationOptions(temperature=0.7, top_k=13)
    tokens: Tensor = choose(logits, torch.full((200,), uniform, dtype=torch.float64), options)
    assert (candidates(logits, options).gather(1, tokens[:, None]) > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": 0.5}, "no effect at temperature 0"),
        ({"stop": ("x", "")}, "stop string is empty"),
        ({"stop": ("x", 5)}, "stop string is 5; it must be text"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be an integer"),
        ({"max_new_tokens": None}, "max_new_tokens is None; it must be an integer"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k is 2.5; it must be an integer"),
        ({"seed": "1"}, "seed is '1'; it must be an integer"),
        ({"batch_size": 2.0}, "batch_size is 2.0; it must be an integer"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**options)  # type: ignore[arg-type]
