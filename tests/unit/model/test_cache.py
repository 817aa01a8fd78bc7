"""The cache for generation: by itself, and in the attention of every kind."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.data.batches import Batch
from moe_train.model.cache import KeyValueCache
from moe_train.model.language_model import LanguageModel, build_language_model
from moe_train.model.micro_batch import MicroBatch, use
from moe_train.model.options import InitOptions, LatentAttentionOptions, ModelOptions, MoEOptions, RopeScaling
from moe_train.parallel.groups import initialize
from moe_train.parallel.options import ParallelOptions
from moe_train.routing.options import RouterOptions
from moe_train.training.step import token_batch

CPU = torch.device("cpu")
BASE = ModelOptions(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    ffn_hidden_size=24,
    moe=MoEOptions(num_experts=4, expert_hidden_size=16),
    init=InitOptions(std=0.2),
)
LATENT = LatentAttentionOptions(query_rank=None, key_value_rank=16, nope_head_dim=8, rope_head_dim=4, value_head_dim=6)
MODELS = {
    "qwen3_moe": dataclasses.replace(BASE, ffn_hidden_size=None),
    "mixed": dataclasses.replace(BASE, dense_layers=[0]),
    "llama3": dataclasses.replace(BASE, family="llama3", rope_scaling=RopeScaling("llama3", 8.0, original_length=8)),
    "deepseek_v3": dataclasses.replace(
        BASE,
        family="deepseek_v3",
        dense_layers=[0],
        latent_attention=LATENT,
        rope_scaling=RopeScaling("yarn", 4.0, original_length=8, mscale=1.0, mscale_all_dim=0.7),
    ),
}


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """The groups of a single process, which other tests of this process must not find."""
    initialize(ParallelOptions())
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_shorter_sequences_are_written_over() -> None:
    cache = KeyValueCache(batch_size=2, capacity=6)
    first = torch.arange(1.0, 7.0).view(3, 2, 1)
    (kept,) = cache.append(1, first)
    assert torch.equal(kept, first)
    assert cache.positions(3).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert cache.visible(3)[0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    cache.advance(torch.tensor([3, 1]))
    assert cache.longest == 3 and cache.positions(1).tolist() == [[3, 1]]
    (kept,) = cache.append(1, torch.tensor([[[10.0], [20.0]]]))
    assert kept[:, 0, 0].tolist() == [1, 3, 5, 10]
    assert kept[:2, 1, 0].tolist() == [2, 20]
    assert cache.visible(1).tolist() == [[[True] * 4], [[True, True, False, False]]]


def test_what_does_not_fit_is_an_error() -> None:
    cache = KeyValueCache(batch_size=1, capacity=4)
    cache.append(1, torch.zeros(3, 1, 2))
    cache.advance(torch.tensor([3]))
    with pytest.raises(ValueError, match="5 tokens do not fit into a cache for 4"):
        cache.append(1, torch.zeros(2, 1, 2))


def logits(model: LanguageModel, ids_BS: Tensor, cache: KeyValueCache | None = None) -> Tensor:
    """[B, S, V]."""
    nothing_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    batch = Batch(ids_BS, ids_BS, nothing_BS, nothing_BS, torch.arange(len(ids_BS)))
    with torch.no_grad(), use(MicroBatch(token_batch(batch, CPU), cache=cache)):
        out: Tensor = model(ids_BS)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_equal_uncached(one_process: None, name: str) -> None:
    """Prompts of different lengths side by side, then token by token, then several at a time."""
    # Not a fresh one: now and then a token's experts are chosen by the last bit of a score.
    seed = zlib.crc32(name.encode())
    rng = torch.Generator().manual_seed(seed)
    model = build_language_model(
        MODELS[name], RouterOptions(options={"top_k": 2}), sequence_length=32, seed=seed % 1000
    ).eval()
    ids_BS = torch.randint(0, 64, (3, 14), generator=rng)
    want = logits(model, ids_BS)
    cache = KeyValueCache(batch_size=3, capacity=20)
    lengths_B = torch.tensor([6, 2, 4])
    got = logits(model, ids_BS[:, :6], cache)
    for b, length in enumerate(lengths_B.tolist()):
        torch.testing.assert_close(got[b, :length], want[b, :length], rtol=1e-5, atol=1e-5)
    cache.advance(lengths_B)
    for count in (1, 1, 3, 1):
        place_BS = cache.lengths_B[:, None] + torch.arange(count)
        got = logits(model, ids_BS.gather(1, place_BS), cache)
        expected = want.gather(1, place_BS[..., None].expand(-1, -1, want.shape[2]))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        cache.advance(torch.full((3,), count))
    assert cache.lengths_B.tolist() == [12, 8, 10]


def test_latent_attention_keeps_the_small_tensors(one_process: None) -> None:
    model = build_language_model(
        MODELS["deepseek_v3"], RouterOptions(options={"top_k": 2}), sequence_length=32, seed=1
    ).eval()
    cache = KeyValueCache(batch_size=2, capacity=5)
    logits(model, torch.zeros(2, 4, dtype=torch.int64), cache)
    assert [sum(kept[0, 0].numel() for kept in layer) for layer in cache._kept.values()] == [16 + 4] * 2
