"""Parameters and FLOPs of every family, against our own model and against transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_train.data.batches import Batch
from moe_train.model.families import FAMILIES, head_width
from moe_train.model.language_model import LanguageModel, build_language_model
from moe_train.model.micro_batch import MicroBatch, use
from moe_train.model.options import ModelOptions, MultiTokenOptions
from moe_train.parallel.groups import initialize
from moe_train.parallel.options import ParallelOptions
from moe_train.training.account import active_parameters, flops_per_token, multi_token_parameters, parameters
from moe_train.training.memory import memory_per_rank
from moe_train.training.run_config import RunConfig, check
from moe_train.training.step import token_batch
from tests.unit.training.random_models import NAMES, TOP_K, random_model, run_config, transformers_fields

DRAWS = range(4)
WITH_EXPERTS = [name for name, family in FAMILIES.items() if family.experts]


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """The groups of a single process, which other tests of this process must not find."""
    initialize(ParallelOptions())
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build(config: RunConfig) -> LanguageModel:
    length = config.data.sequence_length
    return build_language_model(config.model, config.router, sequence_length=length, seed=1)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def random_config(name: str, draw: int) -> RunConfig:
    config = run_config(random_model(name, draw))
    check(config)
    return config


def with_everything(name: str) -> ModelOptions:
    """A shared expert, a dense layer in the middle and padded rows, in every family that has experts."""
    model = random_model(name, 2)
    return dataclasses.replace(
        model,
        num_layers=3,
        ffn_hidden_size=29,
        dense_layers=[1],
        moe=dataclasses.replace(model.moe, shared_expert_hidden_size=23),
    )


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_equal_our_models(one_process: None, name: str, draw: int) -> None:
    config = random_config(name, draw)
    counted = parameters(config)
    assert counted.total + counted.vocab_padding == count(build(config)), config.model
    assert counted.vocab_padding > 0 or config.model.vocab_size % 64 == 0


def test_heads_of_keys_and_values_mean_nothing_with_latent_attention(one_process: None) -> None:
    """Also where they do not divide the heads; neither does the hidden size have to."""
    model = random_model("deepseek_v3", 0)
    model = dataclasses.replace(model, hidden_size=32, num_attention_heads=5, num_key_value_heads=3, head_dim=7)
    config = run_config(model)
    check(config)
    counted = parameters(config)
    assert counted.total + counted.vocab_padding == count(build(config))
    assert counted_flops(config) > 0


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_mixed_layers_and_shared_experts_equal_our_models(one_process: None, name: str) -> None:
    config = run_config(with_everything(name))
    check(config)
    counted = parameters(config)
    assert counted.total + counted.vocab_padding == count(build(config)), config.model
    hidden = config.model.hidden_size
    assert (counted.dense_layers, counted.shared_experts) == (3 * hidden * 29, 2 * 3 * hidden * 23)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_equal_transformers(name: str, draw: int) -> None:
    import transformers

    config = random_config(name, draw)
    fields = transformers_fields(config.model)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(NAMES[name], **fields))
    assert parameters(config).total == count(built), config.model


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.experts])
def test_everything_is_active_without_experts(name: str) -> None:
    config = random_config(name, 1)
    counted = parameters(config)
    assert active_parameters(config) == counted.total
    assert (counted.experts, counted.gates, counted.shared_experts) == (0, 0, 0)
    assert flops_per_token(config).experts == flops_per_token(config).gates == 0


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_active_parameters_leave_out_what_is_not_chosen(name: str) -> None:
    config = run_config(with_everything(name))
    model = config.model
    left = 2 * (model.moe.num_experts - TOP_K) * 3 * model.hidden_size * model.moe.expert_hidden_size
    assert parameters(config).total - active_parameters(config) == left


def counted_flops(config: RunConfig) -> int:
    """What torch counts in a forward pass of our model, with the scores as plain multiplications."""
    model, length = build(config), config.data.sequence_length
    ids_BS = torch.randint(config.model.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    no_BS = torch.zeros(1, length, dtype=torch.bool)
    batch = Batch(ids_BS, ids_BS, ~no_BS, no_BS, torch.zeros(1, dtype=torch.long))
    micro_batch = MicroBatch(token_batch(batch, torch.device("cpu")), {})
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), use(micro_batch):
        model(ids_BS)
    return counter.get_total_flops()


@pytest.mark.parametrize("draw", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_flops_equal_torchs_counter(one_process: None, name: str, draw: int) -> None:
    """Active parameters and the widths of each family's own layers, not the total and not one width for all (pitfall
    37). The counter sees the whole square of the scores where we count half, and queries and values of latent attention
    padded to one width, as the kernels want them."""
    config = random_config(name, draw)
    ours, model, length = flops_per_token(config), config.model, config.data.sequence_length
    padded = 0
    if model.latent_attention is not None:
        missing = abs(head_width(model) - model.latent_attention.value_head_dim)
        padded = 2 * model.num_layers * model.num_attention_heads * missing * length
    assert counted_flops(config) / length == ours.forward + ours.attention_scores + padded, config.model


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_flops_of_mixed_layers_equal_torchs_counter(one_process: None, name: str) -> None:
    model = with_everything(name)
    if model.latent_attention is not None:
        # One width, so that nothing is padded.
        latent = dataclasses.replace(model.latent_attention, value_head_dim=head_width(model))
        model = dataclasses.replace(model, latent_attention=latent)
    config = run_config(model)
    ours = flops_per_token(config)
    assert counted_flops(config) / config.data.sequence_length == ours.forward + ours.attention_scores, model


@pytest.mark.parametrize("draw", [0, 1])
def test_flops_of_latent_attention_equal_transformers(draw: int) -> None:
    """Which multiplies scores by values of their own width."""
    import transformers

    config = random_config("deepseek_v3", draw)
    fields = transformers_fields(config.model)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("deepseek_v3", **fields))
    length = config.data.sequence_length
    ids = torch.randint(config.model.vocab_size, (1, length), generator=torch.Generator().manual_seed(draw))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)
    ours = flops_per_token(config)
    assert counter.get_total_flops() / length == ours.forward + ours.attention_scores, config.model


def multi_token(draw: int) -> tuple[RunConfig, RunConfig]:
    """A configuration without and with multi-token prediction."""
    config = random_config("deepseek_v3", draw)
    model = dataclasses.replace(config.model, multi_token=MultiTokenOptions(layers=1))
    more = dataclasses.replace(config, model=model)
    check(more)
    return config, more


@pytest.mark.parametrize("draw", DRAWS)
def test_multi_token_prediction_is_one_more_layer(draw: int) -> None:
    """With two matrices and three norms of its own, and a second pass of the head: what one more layer of experts adds
    to the model itself, and these."""
    config, more = multi_token(draw)
    model = config.model
    deeper = dataclasses.replace(config, model=dataclasses.replace(model, num_layers=model.num_layers + 1))
    hidden, layer = model.hidden_size, parameters(deeper).total - parameters(config).total
    assert multi_token_parameters(more).total == layer + 3 * hidden + 2 * hidden * hidden
    assert multi_token_parameters(config).total == 0
    assert (parameters(more), active_parameters(more)) == (parameters(config), active_parameters(config))
    flops = flops_per_token(deeper).forward - flops_per_token(config).forward
    flops += 2 * (2 * hidden * hidden + hidden * model.vocab_size)
    assert flops_per_token(more).forward - flops_per_token(config).forward == flops


@pytest.mark.parametrize("draw", DRAWS)
def test_multi_token_parameters_equal_our_models(one_process: None, draw: int) -> None:
    _, config = multi_token(draw)
    model = build(config)
    own = [p for name, p in model.named_parameters() if name.startswith("mtp.")]
    assert sum(p.numel() for p in own) == multi_token_parameters(config).total
    assert count(model) == sum(p.numel() for p in own) + parameters(config).total + parameters(config).vocab_padding


@pytest.mark.parametrize("draw", DRAWS)
def test_flops_of_multi_token_prediction_equal_torchs_counter(one_process: None, draw: int) -> None:
    """The layer with its projection in the module of its own, the second pass in the head's."""
    plain, config = multi_token(draw)
    model, length = config.model, config.data.sequence_length
    assert model.latent_attention is not None
    ours, without = flops_per_token(config), flops_per_token(plain)
    missing = abs(head_width(model) - model.latent_attention.value_head_dim)
    square = ours.attention_scores / model.num_layers + 2 * model.num_attention_heads * missing * length
    counts, counts_without = flops_by_module(config), flops_by_module(plain)
    assert counts["LanguageModel.mtp"] / length == ours.multi_token - ours.head + square
    assert counts["LanguageModel.output_layer"] == 2 * counts_without["LanguageModel.output_layer"]
    assert (without.multi_token, ours.head) == (0, without.head)


def flops_by_module(config: RunConfig) -> dict[str, int]:
    """What torch counts in a forward pass of training."""
    model, length = build(config).train(), config.data.sequence_length
    ids_BS = torch.randint(config.model.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    no_BS = torch.zeros(1, length, dtype=torch.bool)
    batch = Batch(ids_BS, ids_BS, ~no_BS, no_BS, torch.zeros(1, dtype=torch.long))
    totals = {name: torch.tensor(1.0) for name in ("target", "token", "sequence", "micro_batch", "multi_token")}
    micro_batch = MicroBatch(token_batch(batch, torch.device("cpu")), totals)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), use(micro_batch):
        model(ids_BS, ids_BS, ~no_BS)
    return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}


def test_memory_of_multi_token_prediction_is_spread_like_the_rest() -> None:
    config, more = multi_token(0)
    added = multi_token_parameters(more)
    a, b = memory_per_rank(config, 1), memory_per_rank(more, 1)
    assert b.parameters - a.parameters == 4 * (added.dense + added.experts)
    assert b.activations > a.activations


def test_dense_layers_take_no_memory_for_experts() -> None:
    sizes = [random_config(name, 1) for name in ("llama3", "qwen3")]
    for config in sizes:
        wide = dataclasses.replace(config.model.moe, num_experts=64, expert_hidden_size=4096)
        other = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=wide))
        assert memory_per_rank(config, 2) == memory_per_rank(other, 2)
        wider = dataclasses.replace(config.model, ffn_hidden_size=4096)
        assert memory_per_rank(dataclasses.replace(config, model=wider), 2).activations > (
            memory_per_rank(config, 2).activations
        )
