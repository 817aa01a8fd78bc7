"""Parameters against a published model's, FLOPs against torch's own counter. Pitfall 37: prime-rl#778,
Megatron-DeepSpeed#398, Pai-Megatron-Patch#485, maxtext PR678, autoresearch#5, M#1565 (MFU from all parameters, or a
wrong peak: test_peak.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_train.training.account import (
    active_parameters,
    flops_per_slot,
    flops_per_token,
    flops_without_experts,
    gate_facts,
    parameters,
)
from moe_train.training.memory import memory_per_rank
from moe_train.training.run_config import RunConfig, load_run_config
from moe_train.training.summary import summary

SMALL = [
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.vocab_size=96",
    "model.moe.num_experts=4",
    "model.moe.expert_hidden_size=16",
    "data.sequence_length=16",
]


def transformers_model(config: RunConfig, device: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    model, moe = config.model, config.model.moe
    with torch.device(device):
        return transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                hidden_size=model.hidden_size,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_attention_heads,
                num_key_value_heads=model.num_key_value_heads,
                head_dim=model.head_dim or model.hidden_size // model.num_attention_heads,
                vocab_size=model.vocab_size,
                num_experts=moe.num_experts,
                num_experts_per_tok=config.router.options["top_k"],
                moe_intermediate_size=moe.expert_hidden_size,
                tie_word_embeddings=model.tie_embeddings,
                decoder_sparse_step=1,
                mlp_only_layers=[],
                attention_bias=False,
                attn_implementation="eager",
                experts_implementation="eager",
            )
        )


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", ["true", "false"])
def test_small_shapes_equal_transformers(tied: str) -> None:
    config = load_run_config("tiny", [*SMALL, f"model.tie_embeddings={tied}"])
    assert parameters(config).total == count(transformers_model(config, "meta"))


@pytest.mark.parametrize(("tied", "matrices"), [("true", 1), ("false", 2)])
def test_vocabulary_padding_is_counted_apart(tied: str, matrices: int) -> None:
    sizes = ["model.vocab_size=8200", "model.vocab_multiple=128"]
    config = load_run_config("tiny", [*sizes, f"model.tie_embeddings={tied}"])
    counted = parameters(config)
    assert counted.vocab_padding == (8320 - 8200) * 64 * matrices
    assert counted.embedding == 8200 * 64
    assert counted.dense == counted.total - counted.experts + counted.vocab_padding


def test_shared_expert_is_always_active() -> None:
    without = load_run_config("tiny")
    config = load_run_config("tiny", ["model.moe.shared_expert_hidden_size=48"])
    added = 2 * 3 * 64 * 48
    assert parameters(config).total - parameters(without).total == added
    assert active_parameters(config) - active_parameters(without) == added
    assert flops_per_token(config).forward - flops_per_token(without).forward == 2 * added


def test_flops_equal_torchs_counter() -> None:
    """The counter sees the whole square of the scores (transformers masks it), we count the causal half."""
    config = load_run_config("tiny", SMALL)
    torch.manual_seed(0)
    model = transformers_model(config, "cpu")
    length = config.data.sequence_length
    ids = torch.randint(config.model.vocab_size, (1, length))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)
    ours = flops_per_token(config)
    assert counter.get_total_flops() / length == ours.forward + ours.attention_scores
    assert ours.total == 3 * ours.forward


def test_memory_by_zero_stage() -> None:
    """Two ranks, EP 2: experts have one replica each, so ZeRO shards the rest only."""
    memory = {stage: memory_per_rank(load_run_config("demo", [f"train.zero_stage={stage}"]), 2) for stage in (1, 2, 3)}
    counted = parameters(load_run_config("demo"))
    whole, shard = counted.dense + counted.experts // 2, counted.dense // 2 + counted.experts // 2
    assert [memory[stage].parameters for stage in (1, 2, 3)] == [4 * whole, 4 * whole, 4 * shard]
    assert [memory[stage].gradients for stage in (1, 2, 3)] == [4 * whole, 4 * shard, 4 * shard]
    assert {memory[stage].optimizer for stage in (1, 2, 3)} == {12 * shard}


def test_recomputation_needs_less_memory() -> None:
    plain, recomputed = (
        memory_per_rank(load_run_config("demo", [f"train.recompute={flag}"]), 2) for flag in ("false", "true")
    )
    assert recomputed.activations < plain.activations
    assert recomputed.parameters == plain.parameters


def test_summary_says_the_figures() -> None:
    config = load_run_config("demo", ["train.steps=128", "train.global_batch_size=16", "train.micro_batch_size=4"])
    text = summary(config, 2, Path("runs/demo"), "cpu")
    for figure in ("17,467,904", "6,457,856", "EP 2", "16 experts each", "accumulation 2", "524,288 tokens"):
        assert figure in text


def test_gates_with_parts_of_their_own() -> None:
    """Latent prototypes at hidden 1024, latent 16, 128 experts: norm 2,048, encoder 32,800, decoder 17,408, prototypes
    2,048."""
    config = load_run_config("demo", ["parts.router=lpr", "model.hidden_size=1024", "model.moe.num_experts=128"])
    assert parameters(config).gates == 4 * 54_304
    assert gate_facts(config).experts_per_token == 4


def test_frozen_and_averaged_prototypes_cost_what_learned_ones_do() -> None:
    """They are met in the same products, in the scores and again in the mixture, and are no parameters."""
    lines = ["parts.router=lpr", "model.hidden_size=1024", "model.moe.num_experts=128"]
    kinds = {
        kind: load_run_config("demo", [*lines, f"router.options.prototypes={kind}"])
        for kind in ("learned", "frozen", "ema")
    }
    assert {flops_per_token(config).gates for config in kinds.values()} == {2 * 4 * (32_768 + 16_384 + 2 * 2_048)}
    trained = {kind: parameters(config).gates for kind, config in kinds.items()}
    assert trained["learned"] == 4 * 54_304 and trained["frozen"] == trained["ema"] == 4 * (54_304 - 2_048)


def test_a_varying_number_of_experts_counts_its_bound() -> None:
    bounded = load_run_config("demo", ["parts.router=dynamic_k", "router.options.max_k=6"])
    free = load_run_config("demo", ["parts.router=dynamic_k", "router.options.max_k=null"])
    assert gate_facts(bounded).experts_per_token == 6
    assert active_parameters(free) == parameters(free).total
    expert = 3 * 256 * 128
    assert active_parameters(free) - active_parameters(bounded) == 4 * (32 - 6) * expert
    assert active_parameters(free, mean_k=2.5) == active_parameters(free) - 4 * round((32 - 2.5) * expert)


@pytest.mark.parametrize("gate, option, k", [("relu", "mean_k", 3), ("expert_choice", "capacity_factor", 2.5)])
def test_a_mean_that_the_gate_aims_at(gate: str, option: str, k: float) -> None:
    lines = [f"parts.router={gate}", f"router.options.{option}={k}", "causal_exceptions=[expert_choice]"]
    config = load_run_config("demo", lines)
    assert gate_facts(config).experts_per_token == 32
    counted, expert = parameters(config), 3 * 256 * 128
    assert active_parameters(config) == counted.total - counted.experts + 4 * k * expert
    assert flops_per_token(config).experts == 2 * 4 * k * expert
    experts = 4 * k * flops_per_slot(config)
    assert flops_without_experts(config) + experts == pytest.approx(flops_per_token(config).total)
    said = summary(config, 2, Path("run"), "cpu")
    assert f"({k:g} of 32 experts per token on average, at most 32)" in said
