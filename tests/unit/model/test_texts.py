"""Texts that share a sequence do not see each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_train.data.batches import Batch
from moe_train.model.language_model import LanguageModel, build_language_model
from moe_train.model.micro_batch import MicroBatch, as_root, use
from moe_train.model.options import InitOptions, LatentAttentionOptions, ModelOptions, MoEOptions, MultiTokenOptions
from moe_train.model.texts import attend, attend_reference, texts_of
from moe_train.parallel.groups import initialize
from moe_train.parallel.options import ParallelOptions
from moe_train.routing.options import RouterOptions
from moe_train.training.step import batch_texts, token_batch

MODEL = ModelOptions(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    moe=MoEOptions(num_experts=4, expert_hidden_size=16),
    init=InitOptions(std=0.2),
)
LATENT = dataclasses.replace(
    MODEL,
    family="deepseek_v3",
    dense_layers=[1],
    ffn_hidden_size=24,
    latent_attention=LatentAttentionOptions(16, 8, nope_head_dim=8, rope_head_dim=4, value_head_dim=6),
    multi_token=MultiTokenOptions(layers=1, coefficient=0.5),
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """The groups of a single process, which other tests of this process must not find."""
    initialize(ParallelOptions())
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def positions(rows: list[list[int]]) -> Tensor:
    return torch.tensor([[i for length in row for i in range(length)] for row in rows])


def batch_of(ids_BS: Tensor, labels_BS: Tensor, target_BS: Tensor, position_BS: Tensor | None = None) -> Batch:
    padding_BS = torch.zeros_like(target_BS)
    return Batch(ids_BS, labels_BS, target_BS, padding_BS, torch.arange(len(ids_BS)), position_BS=position_BS)


def run(model: LanguageModel, batch: Batch) -> Tensor:
    """Backward through the sum of the losses; the losses of the tokens."""
    one = torch.tensor(1.0)
    totals = {name: one for name in ("target", "token", "sequence", "micro_batch", "multi_token")}
    micro_batch = MicroBatch(token_batch(batch, CPU), totals, texts=batch_texts(batch, CPU))
    with use(micro_batch):
        nll_sum, nll_BS = model(batch.ids_BS, batch.labels_BS, batch.target_BS)
    as_root(nll_sum, micro_batch).backward()
    return nll_BS


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("model_options", [MODEL, LATENT], ids=["grouped", "latent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [[[3, 9, 1, 7]], [[20], [5, 15], [1, 1, 17, 1]]])
def test_loss_and_gradients_are_those_of_separate_texts(
    one_process: None, rows: list[list[int]], recompute: bool, dtype: torch.dtype, model_options: ModelOptions
) -> None:
    """Micro-batches of one and several sequences, grouped heads, rotary positions, every third label no target; values
    of another width than keys, and multi-token prediction."""
    router = RouterOptions(gate="softmax_topk", options={"top_k": 2})
    options = dataclasses.replace(model_options, moe=dataclasses.replace(model_options.moe, experts="reference"))
    options = model_options if dtype == torch.float32 else options  # the grouped kernel has no float64
    model = build_language_model(options, router, sequence_length=20, seed=3, recompute=recompute)
    model.to(dtype).train()
    rng = torch.Generator().manual_seed(len(rows))
    ids_BS, labels_BS = torch.randint(0, 64, (2, len(rows), 20), generator=rng)
    target_BS = torch.arange(20).expand(len(rows), 20) % 3 != 2
    together = run(model, batch_of(ids_BS, labels_BS, target_BS, positions(rows)))
    grads = gradients(model)

    separate = torch.zeros_like(together)
    for b, row in enumerate(rows):
        start = 0
        for length in row:
            part = (slice(b, b + 1), slice(start, start + length))
            separate[part] = run(model, batch_of(ids_BS[part], labels_BS[part], target_BS[part]))
            start += length
    expected = gradients(model)
    assert grads.keys() == expected.keys() and "embedding.word_embeddings.weight" in grads
    # Gradients of float32 sum up a dozen roundings; float64 shows that nothing but rounding differs.
    loss_within, gradient_within = (1e-6, 3e-6) if dtype == torch.float32 else (1e-14, 1e-13)
    torch.testing.assert_close(together, separate, rtol=loss_within, atol=loss_within)
    for name, want in expected.items():
        assert (grads[name] - want).abs().max() <= gradient_within * want.abs().max(), name

    whole = run(model, batch_of(ids_BS, labels_BS, target_BS))
    assert (whole - together).abs().max() > 1e-2 or rows == [[20]], "the texts would not matter"


class Shapes(TorchDispatchMode):
    """Every operation that is carried out, and the shapes of the tensors that it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        shapes = {tuple(x.shape) for x in tree_leaves(result) if isinstance(x, Tensor)}
        self.seen.setdefault(func.overloadpacket.__name__, set()).update(shapes)
        return result

    def square(self, length: int) -> dict[str, tuple[int, ...]]:
        """What has two dimensions of at least this length."""
        return {
            name: shape for name, found in self.seen.items() for shape in found if sum(n >= length for n in shape) >= 2
        }


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cut", [True, False])
def test_no_tensor_has_the_square_of_a_long_sequence(one_process: None, cut: bool, recompute: bool) -> None:
    """A mask or scores of S x S are 21 million elements here, per head for scores. Forward and backward, with texts of
    all lengths, one of them longer than 4096 tokens; and with a sequence that is one text."""
    length = 4608 if not cut else 4608 + 1024
    router = RouterOptions(gate="softmax_topk", options={"top_k": 2})
    model = build_language_model(
        dataclasses.replace(MODEL, num_layers=1), router, sequence_length=length, seed=3, recompute=recompute
    )
    model.train()
    ids_BS, labels_BS = torch.randint(0, 64, (2, 1, length))
    rows = positions([[1, 300, 2, 4608, 700, 21]]) if cut else None
    assert rows is None or rows.shape == ids_BS.shape
    with Shapes() as shapes:
        run(model, batch_of(ids_BS, labels_BS, torch.ones(1, length, dtype=torch.bool), rows))
    forward, backward = (f"_scaled_dot_product_flash_attention_for_cpu{end}" for end in ("", "_backward"))
    assert {forward, backward} <= shapes.seen.keys(), "attention was not watched"
    assert all(p.grad is not None for p in model.parameters())
    assert shapes.square(4096) == {}
    # What is looked for would be found.
    q_BNSD = torch.zeros(1, 1, 4096, 2)
    with Shapes() as explicit:
        torch.nn.functional.scaled_dot_product_attention(q_BNSD, q_BNSD, q_BNSD, torch.ones(4096, 4096).bool())
    assert explicit.square(4096)


def test_texts_of() -> None:
    texts = texts_of(positions([[3, 2], [5], [1, 4]]), CPU)
    assert texts.lengths == [3, 2, 5, 1, 4]
    assert texts.ends.tolist() == [0, 3, 5, 10, 11, 15] and texts.ends.dtype == torch.int32
    assert texts.position_SB.shape == (5, 3) and texts.position_SB[:, 2].tolist() == [0, 0, 1, 2, 3]


def test_the_kernel_for_all_texts_is_told_what_the_reference_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in that takes the same arguments; only where the inputs fit."""
    texts = texts_of(positions([[3, 9, 1], [5, 8, 0]]), CPU)
    q_TND, k_TGD, v_TGD = (torch.randn(26, heads, 8) for heads in (4, 2, 2))

    def kernel(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, **more: Any):
        assert all(x.is_contiguous() for x in (q, k, v)) and max_q == max_k == 9
        assert more["window_size"] == (-1, 0) and more["enable_gqa"] and ends_q.dtype == ends_k.dtype == torch.int32
        rows = zip(ends_q.tolist(), ends_q[1:].tolist(), strict=False)
        one = [(q[a:b], k[a:b].repeat_interleave(2, 1), v[a:b].repeat_interleave(2, 1)) for a, b in rows]
        scores = [torch.einsum("ind,jnd->nij", a, b) * more["scale"] for a, b, _ in one]
        masked = [s.masked_fill(torch.ones_like(s).triu(1).bool(), -torch.inf).softmax(-1) for s in scores]
        return torch.cat([torch.einsum("nij,jnd->ind", m, v) for m, (_, _, v) in zip(masked, one, strict=True)]) + 1

    monkeypatch.setattr("moe_train.model.texts._variable_length_kernel", lambda: kernel)
    want = attend_reference(q_TND, k_TGD, v_TGD, texts, 0.3)
    assert torch.equal(attend(q_TND, k_TGD, v_TGD, texts, 0.3), want), "a CPU has no such kernel"
    monkeypatch.setattr("moe_train.model.texts.flash_takes", lambda x: x.shape == q_TND.shape)
    torch.testing.assert_close(attend(q_TND, k_TGD, v_TGD, texts, 0.3) - 1, want, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel for texts of different lengths needs CUDA")
@pytest.mark.parametrize("groups", [8, 2])
def test_one_kernel_for_all_texts_is_the_reference(groups: int) -> None:
    rng = np.random.default_rng(groups)
    lengths = rng.integers(1, 300, 9).tolist()
    texts = texts_of(positions([lengths]), torch.device("cuda"))
    shapes = [(sum(lengths), heads, 64) for heads in (8, groups, groups)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    outputs = [f(*inputs, texts, None) for f in (attend, attend_reference)]
    weight = torch.randn_like(outputs[0])
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in outputs]
    for got, want in zip([outputs[0], *grads[0]], [outputs[1], *grads[1]], strict=True):
        assert (got.float() - want.float()).abs().max() <= 0.03 * want.float().abs().max()
