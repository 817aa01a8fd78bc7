from __future__ import annotations

import pytest
import torch

from moe_train.routing.noise import counter_normal, counter_uniform, philox4x32


def tokens(count=64, sequence=16):
    t = torch.arange(count)
    return t // sequence + 1000, t % sequence


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """Known-answer vectors of Philox4x32-10 that Salmon et al. published with their code."""
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("draw", [counter_normal, counter_uniform])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5)])
def test_same_token_same_noise_in_any_batch(draw, shape):
    sample_T, position_T = tokens()
    whole = draw("gate", (1, 2, 3), sample_T, position_T, shape)
    assert whole.shape == (64, *shape) and whole.dtype == torch.float32
    order = torch.randperm(64)[:19]
    assert torch.equal(draw("gate", (1, 2, 3), sample_T[order], position_T[order], shape), whole[order])
    for t in (0, 5, 63):
        assert torch.equal(draw("gate", (1, 2, 3), sample_T[t : t + 1], position_T[t : t + 1], shape)[0], whole[t])


@pytest.mark.parametrize("shape", [(1,), (6,)])
def test_first_numbers_do_not_depend_on_how_many_are_drawn(shape):
    long = counter_normal("a", (0,), *tokens(), (9,))
    assert torch.equal(counter_normal("a", (0,), *tokens(), shape), long[:, : shape[0]])


def test_moments_of_the_normal():
    x = counter_normal("moments", (0, 0, 0), *tokens(20000, 500), (8,)).double()
    count = x.numel()
    assert abs(float(x.mean())) < 5 / count**0.5
    assert abs(float(x.var()) - 1) < 5 * (2 / count) ** 0.5
    assert abs(float((x**3).mean())) < 5 * (15 / count) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 5 * (96 / count) ** 0.5
    correlation = (x.T @ x) / x.shape[0] - torch.eye(8, dtype=torch.float64)
    assert float(correlation.abs().max()) < 6 / x.shape[0] ** 0.5 * 1.5


def test_uniform_is_open_and_even():
    x = counter_uniform("u", (0,), *tokens(20000, 500), (5,))
    assert 0 < float(x.min()) and float(x.max()) < 1
    counts = torch.histc(x, bins=10, min=0, max=1)
    expected = x.numel() / 10
    assert float(((counts - expected) ** 2 / expected).sum()) < 40  # chi square, 9 degrees of freedom


def test_names_seeds_steps_layers_samples_and_positions_are_independent():
    sample_T, position_T = tokens(4000, 100)
    base = counter_normal("a", (1, 2, 3), sample_T, position_T, (4,))
    others = [
        counter_normal("b", (1, 2, 3), sample_T, position_T, (4,)),
        counter_normal("a", (2, 2, 3), sample_T, position_T, (4,)),
        counter_normal("a", (1, 3, 3), sample_T, position_T, (4,)),
        counter_normal("a", (1, 2, 4), sample_T, position_T, (4,)),
        counter_normal("a", (1, 23), sample_T, position_T, (4,)),
        counter_normal("a", (1, 2, 3), sample_T + 1, position_T, (4,)),
        counter_normal("a", (1, 2, 3), sample_T + 2**32, position_T, (4,)),
        counter_normal("a", (1, 2, 3), sample_T, position_T + 1, (4,)),
    ]
    for other in others:
        assert abs(float((base * other).mean())) < 5 / base.numel() ** 0.5
    assert torch.equal(base, counter_normal("a", (1, 2, 3), sample_T, position_T, (4,)))


def test_padding_rows_and_no_tokens():
    assert torch.isfinite(counter_normal("a", (0,), torch.tensor([-1]), torch.tensor([0]), (3,))).all()
    empty = torch.zeros(0, dtype=torch.int64)
    assert counter_normal("a", (0,), empty, empty, (3,)).shape == (0, 3)
