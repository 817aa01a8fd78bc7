"""The estimate of activations against what autograd really keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from moe_train.data.batches import Batch
from moe_train.data.options import DataOptions
from moe_train.model.families import FAMILIES
from moe_train.model.head import default_chunk_tokens
from moe_train.model.language_model import build_language_model
from moe_train.model.micro_batch import MicroBatch, use
from moe_train.model.options import LatentAttentionOptions, ModelOptions, MoEOptions, MultiTokenOptions
from moe_train.parallel.groups import initialize
from moe_train.parallel.options import ParallelOptions
from moe_train.routing.options import CapacityOptions, RouterOptions
from moe_train.training.memory import memory_per_rank, rows_per_token
from moe_train.training.options import TrainOptions
from moe_train.training.run_config import RunConfig, check
from moe_train.training.step import token_batch

TOLERANCE = 0.05
"""The estimate leaves out what is small: scales of norms, cosines, the kernel's logarithms of sums."""
LENGTH, BATCH, TOP_K = 64, 2, 2


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """The groups of a single process, which other tests of this process must not find."""
    initialize(ParallelOptions())
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def small(name: str, inner: int, **changes: object) -> RunConfig:
    """``inner``: width of all feed-forward parts."""
    family = FAMILIES[name]
    latent = LatentAttentionOptions(24, 32, nope_head_dim=16, rope_head_dim=8, value_head_dim=24)
    model = ModelOptions(
        family=name,  # type: ignore[arg-type]
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        ffn_hidden_size=None if name in ("mixtral", "olmoe", "qwen3_moe") else inner,
        dense_layers=[0] if family.latent_attention else [],
        vocab_size=64,
        latent_attention=latent if family.latent_attention else None,
        moe=MoEOptions(
            num_experts=8,
            expert_hidden_size=inner,
            shared_expert_hidden_size=inner if family.latent_attention else None,
        ),
        loss_chunk_tokens=1,  # logits are gone after the forward pass
    )
    config = RunConfig(
        model=dataclasses.replace(model, **changes),  # type: ignore[arg-type]
        router=RouterOptions(gate="softmax_topk", options={"top_k": TOP_K}),
        data=DataOptions(sequence_length=LENGTH),
        train=TrainOptions(micro_batch_size=BATCH, global_batch_size=BATCH),
    )
    check(config)
    return config


def saved_bytes(config: RunConfig) -> int:
    """Of all storages that the graph of a training pass holds, parameters left out."""
    model = build_language_model(config.model, config.router, sequence_length=LENGTH, seed=1).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids_BS = torch.randint(config.model.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
    no_BS = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    batch = Batch(ids_BS, ids_BS, ~no_BS, no_BS, torch.zeros(BATCH, dtype=torch.long))
    totals = {name: torch.tensor(1.0) for name in ("target", "token", "sequence", "micro_batch", "multi_token")}
    storages: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x), use(MicroBatch(token_batch(batch, torch.device("cpu")), totals)):
        loss, _ = model(ids_BS, ids_BS, ~no_BS)
    assert loss.requires_grad
    return sum(size for place, size in storages.items() if place not in own)


@pytest.mark.parametrize("inner", [16, 64, 256], ids="inner{}".format)
@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_what_autograd_keeps(one_process: None, name: str, inner: int) -> None:
    config = small(name, inner)
    estimate, kept = memory_per_rank(config, 1).activations, saved_bytes(config)
    print(f"{name}: estimate {estimate:,}, kept {kept:,}, {estimate / kept:.3f}")
    assert estimate == pytest.approx(kept, rel=TOLERANCE)


VARIANTS = {
    "olmoe": {"clip_qkv": 0.5},
    "llama3": {"num_key_value_heads": 1, "head_dim": 32},
    "deepseek_v3": {
        "latent_attention": LatentAttentionOptions(None, 32, nope_head_dim=16, rope_head_dim=16, value_head_dim=8),
        "multi_token": MultiTokenOptions(layers=1),
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(one_process: None, name: str) -> None:
    config = small(name, 32, **VARIANTS[name])
    assert memory_per_rank(config, 1).activations == pytest.approx(saved_bytes(config), rel=TOLERANCE)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_logits_are_those_of_the_heads_own_chunk(device: str) -> None:
    """Also where the smallest chunk is more than the size aimed at, and never more than there are tokens."""
    for vocabulary, length in ((64, LENGTH), (2**20, LENGTH), (2**20, 2**13)):
        config = small("llama3", 16, vocab_size=vocabulary, loss_chunk_tokens=None)
        one = small("llama3", 16, vocab_size=vocabulary)
        config, one = (dataclasses.replace(c, data=DataOptions(sequence_length=length)) for c in (config, one))
        more = memory_per_rank(config, 1, device).activations - memory_per_rank(one, 1, device).activations
        chunk = min(BATCH * length, default_chunk_tokens(vocabulary, device))
        assert more == (chunk - 1) * vocabulary * 4
    assert default_chunk_tokens(2**20, "cpu") == 32


def routed(gate: str = "softmax_topk", options: dict[str, object] | None = None, **changes: object) -> RunConfig:
    """8 experts, 2 sequences of 64 tokens."""
    config = small("qwen3_moe", 64)
    capacity = changes.pop("capacity", CapacityOptions())
    router = RouterOptions(gate, {"top_k": 2} if options is None else options, capacity=capacity)  # type: ignore[arg-type]
    return dataclasses.replace(config, router=router, parallel=ParallelOptions(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "balanced", "worst"),
    [
        (routed(), 2, 2),
        (routed(expert=2), 2, 4),
        (routed(expert=4), 2, 8),
        (routed(expert=8), 2, 8),  # one expert per rank, so that a token has one row there
        (routed("dynamic_k", {}, expert=4), 8, 8),
        # ceil(1.25 * 64 * 2 / 8) = 20 places in 64 tokens for each of 8 experts
        (routed(expert=4, capacity=CapacityOptions(1.25)), 2, 2.5),
        (routed(expert=4, capacity=CapacityOptions(1.25, pool="micro_batch")), 2, 2.5),
        (routed(expert=4, capacity=CapacityOptions(0.5)), 1, 1),
        (routed(expert=4, capacity=CapacityOptions(1.25, pad=True)), 2.5, 2.5),
        (routed(capacity=CapacityOptions(0.5)), 2, 2),
        (routed(capacity=CapacityOptions(0.5, pad=True)), 1, 1),
    ],
)
def test_rows_at_worst(config: RunConfig, balanced: float, worst: float) -> None:
    """Pitfall 36 (DeepEP#99, verl PR4103, M#1839): all tokens on one rank, and what a capacity leaves of that."""
    assert rows_per_token(config, worst=False) == balanced and rows_per_token(config, worst=True) == worst
    memory = memory_per_rank(config, config.parallel.expert)
    row = config.model.hidden_size + 5 * config.model.moe.expert_hidden_size
    assert memory.further_worst_case == (worst - balanced) * row * 4 * BATCH * LENGTH * config.model.num_layers
    assert memory.total == memory.parameters + memory.gradients + memory.optimizer + memory.activations


@pytest.mark.parametrize("factor", [0.5, 1.25])
def test_activations_with_padding_are_what_autograd_keeps(one_process: None, factor: float) -> None:
    config = routed(capacity=CapacityOptions(factor, pad=True))
    assert memory_per_rank(config, 1).activations == pytest.approx(saved_bytes(config), rel=TOLERANCE)
