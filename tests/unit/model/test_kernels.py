from __future__ import annotations

import pytest
import torch

from moe_train.model.kernels import attend_visible, causal_attention, flash_fits, flash_takes

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_flash_fits_from_ampere_on(capability: tuple[int, int], dtype: torch.dtype) -> None:
    assert all(flash_fits(capability, dtype, width) for width in (8, 64, 80, 128, 192, 256))
    assert not any(flash_fits(capability, dtype, width) for width in (1, 20, 100, 257, 264, 512))


@pytest.mark.parametrize("capability", [None, (5, 0), (7, 0), (7, 5)])
def test_flash_does_not_fit_older_and_other_devices(capability: tuple[int, int] | None) -> None:
    assert not any(flash_fits(capability, dtype, 64) for dtype in HALF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flash_fits_16_bit_types_only(dtype: torch.dtype) -> None:
    assert not any(flash_fits(capability, dtype, 64) for capability in ((8, 0), (9, 0), (12, 0)))


def test_widths_without_a_backward_pass_on_small_devices() -> None:
    for capability, fits in {(8, 0): True, (8, 6): False, (8, 9): False, (9, 0): True, (12, 0): False}.items():
        assert [flash_fits(capability, torch.bfloat16, width) for width in (192, 200, 224, 232)] == [
            *(True, fits, fits, True)
        ]  # fmt: skip


def test_flash_is_for_cuda() -> None:
    assert not flash_takes(torch.zeros(2, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 1), (3, 3)])
def test_repeated_heads_give_what_shared_ones_do(heads: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(2, n, 11, 8) for n in (heads, groups, groups)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(shapes[0], dtype=torch.float64)
    calls: list[bool] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: torch.Tensor, enable_gqa: bool, **more: object) -> torch.Tensor:
        calls.append(enable_gqa)
        return original(*args, enable_gqa=enable_gqa, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    found = []
    for takes in (True, False):
        monkeypatch.setattr("moe_train.model.kernels._takes_groups", lambda q, takes=takes: takes)
        out = causal_attention(*inputs, 0.4)
        found.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    assert calls == [heads != groups, False]
    for shared, repeated in zip(*found, strict=True):
        torch.testing.assert_close(shared, repeated)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value_width", [8, 4, 12])
def test_values_of_another_width(value_width: int, masked: bool) -> None:
    """Narrower as in DeepSeek's models, or wider than queries and keys: what plain softmax attention gives."""
    q, k = torch.randn(2, 4, 6, 8, dtype=torch.float64), torch.randn(2, 2, 6, 8, dtype=torch.float64)
    v = torch.randn(2, 2, 6, value_width, dtype=torch.float64)
    visible = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 6, 6)
    got = attend_visible(q, k, v, visible, 0.3) if masked else causal_attention(q, k, v, 0.3)
    scores = 0.3 * q @ k.repeat_interleave(2, dim=1).transpose(-1, -2)
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    torch.testing.assert_close(got, scores.softmax(-1) @ v.repeat_interleave(2, dim=1))
