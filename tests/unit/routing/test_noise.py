from __future__ import annotations

import pytest
import torch

from moe_train.routing import noise
from moe_train.routing.noise import counter_normal, philox4x32


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


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5)])
def test_same_token_same_noise_in_any_batch(shape):
    sample_T, position_T = tokens()
    whole = counter_normal("gate", (1, 2, 3), sample_T, position_T, shape)
    assert whole.shape == (64, *shape) and whole.dtype == torch.float32
    order = torch.randperm(64)[:19]
    assert torch.equal(counter_normal("gate", (1, 2, 3), sample_T[order], position_T[order], shape), whole[order])
    for t in (0, 5, 63):
        alone = counter_normal("gate", (1, 2, 3), sample_T[t : t + 1], position_T[t : t + 1], shape)
        assert torch.equal(alone[0], whole[t])


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


def test_through_its_distribution_function_it_is_uniform(monkeypatch):
    """How gates get uniform numbers. At the ends of the 32-bit words, where the normal is largest, strictly between 0
    and 1 in float64; in float32, whose distribution function is 0 below about -5.5, still not outside."""
    x = torch.special.ndtr(counter_normal("u", (0,), *tokens(20000, 500), (5,)))
    counts = torch.histc(x, bins=10, min=0, max=1)
    expected = x.numel() / 10
    assert float(((counts - expected) ** 2 / expected).sum()) < 40  # chi square, 9 degrees of freedom
    for angle in (0, 2**31):  # cosine 1 and -1
        words = (torch.tensor([[0]]), torch.tensor([[angle]])) * 2
        monkeypatch.setattr(noise, "_words", lambda *_, words=words: words)
        extreme = counter_normal("u", (0,), *tokens(1, 1), ())
        assert 6.7 < abs(float(extreme)) <= 6.8 and float(extreme.sign()) == (1 if angle == 0 else -1)
        assert 0 <= float(torch.special.ndtr(extreme)) <= 1
        assert 0 < float(torch.special.ndtr(extreme.double())) < 1


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
