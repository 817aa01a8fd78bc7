"""The shapes in configs/model: published ones against what transformers computes, the others against their papers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train import cli
from moe_train.config.compose import names, shipped_configs
from moe_train.model.families import family_of
from moe_train.training.account import active_parameters, gate_facts, multi_token_parameters, parameters
from moe_train.training.run_config import RunConfig, load_run_config

PUBLISHED: dict[str, dict[str, Any]] = {
    "olmoe_1b_7b": {
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "vocab_size": 50304,
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    },
    "mixtral_8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rope_theta": 10000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "topk_group": 4,
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "qwen3_0.6b": {
        "model_type": "qwen3",
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rope_theta": 1000000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "llama3_8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
}
"""From each model's config.json on the hub; sizes, and what changes the function without changing the size."""
ACTIVE_BILLIONS = {
    "olmoe_1b_7b": 1.28,
    "qwen3_30b_a3b": 3.35,
    "mixtral_8x7b": 12.88,
    "deepseek_v3": 37.55,
    "qwen3_0.6b": 0.60,
    "llama3_8b": 8.03,
}
ROUTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe_1b_7b": ("softmax_topk", {"top_k": 8, "softmax": "before", "renormalize": False}),
    "qwen3_30b_a3b": ("softmax_topk", {"top_k": 8, "softmax": "before", "renormalize": True}),
    "mixtral_8x7b": ("softmax_topk", {"top_k": 2, "softmax": "after"}),
    "deepseek_v3": (
        "sigmoid_topk",
        {"top_k": 8, "num_groups": 8, "groups_per_token": 4, "renormalize": True, "scaling": 2.5},
    ),
}
LPR_MILLIONS = {"lpr_mixtral_0.6b": 629.1, "lpr_qwen3_moe_0.6b": 644.9, "lpr_deepseek_v3_0.6b": 620.8}


def with_model(name: str, *overrides: str, top_k: int = 8) -> RunConfig:
    """The tiny experiment with another model, whatever router that has by itself."""
    return load_run_config("tiny", [f"parts.model={name}", f"router.options.top_k={top_k}", *overrides])


@pytest.mark.parametrize("name", names("model"))
def test_every_shipped_model_is_right(name: str) -> None:
    config = with_model(name, top_k=2)
    assert parameters(config).total > active_parameters(config) or not family_of(config.model).experts


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_equal_transformers(name: str) -> None:
    """To the last parameter; transformers builds no multi-token prediction, which we count apart."""
    import transformers

    fields = dict(PUBLISHED[name])
    shape = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape)
    config = with_model(name, top_k=PUBLISHED[name].get("num_experts_per_tok", 2))
    assert parameters(config).total == sum(p.numel() for p in model.parameters())
    assert round(active_parameters(config) / 1e9, 2) == ACTIVE_BILLIONS[name]
    assert config.model.norm_eps == fields["rms_norm_eps"] and config.model.rope_theta == fields["rope_theta"]


def test_deepseek_v3_has_one_layer_of_multi_token_prediction() -> None:
    hidden, heads = 7168, 128
    attention = hidden * 1536 + 1536 + 1536 * heads * 192
    attention += hidden * (512 + 64) + 512 + 512 * heads * 256 + heads * 128 * hidden
    experts = (256 + 1) * 3 * hidden * 2048 + 256 * hidden
    own = 2 * hidden * hidden + 3 * hidden
    counted = multi_token_parameters(with_model("deepseek_v3")).total
    assert counted == attention + experts + 2 * hidden + own == 11_610_067_968


@pytest.mark.parametrize("name", [*ROUTERS])
def test_published_routers(name: str) -> None:
    gate, options = ROUTERS[name]
    config = load_run_config(name)
    assert config.router.gate == gate
    assert {key: config.router.options[key] for key in options} == options
    assert gate_facts(config).experts_per_token == PUBLISHED[name]["num_experts_per_tok"]
    assert gate_facts(config).parameters == config.model.moe.num_experts * config.model.hidden_size
    assert (config.router.balancing.bias.rate > 0) == (name == "deepseek_v3")


@pytest.mark.parametrize("name", [*PUBLISHED])
def test_published_shapes_run_dry(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", name, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"{parameters(load_run_config(name)).total:,} in total" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", LPR_MILLIONS)
def test_the_sizes_of_the_paper_on_latent_prototypes(name: str) -> None:
    """With the plain gate, and without the rows that pad the vocabulary: 151,669 is no multiple of 64."""
    counted = parameters(with_model(name))
    assert round(counted.total / 1e6, 1) == LPR_MILLIONS[name]
    assert counted.vocab_padding == 2 * (151_680 - 151_669) * 1024


def test_experts_of_width_110_are_counted_as_such() -> None:
    """Kernels pad them, parameters and FLOPs do not know it. Published: 43.25 million per layer, and 1.69 million of
    shared ones; 66.88 million active without embedding and head."""
    config = with_model("lpr_deepseek_v3_0.6b")
    counted = parameters(config)
    assert counted.experts == 6 * 128 * 3 * 1024 * 110
    assert counted.shared_experts == 6 * 3 * 1024 * 550
    assert round((active_parameters(config) - counted.embedding - counted.head) / 1e6, 2) == 66.88


def test_the_model_of_optimal_moe() -> None:
    """207.18 million, 75.06 active, 181.45 and 49.33 without the embedding."""
    config = with_model("optimal_moe_207m", top_k=2)
    counted, active = parameters(config), active_parameters(config)
    assert [round(n / 1e6, 2) for n in (counted.total, active)] == [207.18, 75.06]
    assert [round((n - counted.embedding) / 1e6, 2) for n in (counted.total, active)] == [181.45, 49.33]


def test_dense_twins_have_the_same_size() -> None:
    """All of the parameters, or the active ones, but the gates."""
    config = with_model("moe_router_33m", top_k=2)
    gates = parameters(config).gates
    for twin, size in (("active", active_parameters(config)), ("total", parameters(config).total)):
        assert parameters(with_model(f"moe_router_dense_{twin}", top_k=2)).total == size - gates


@pytest.mark.parametrize("name", ["moe_router_33m", "dynamic_k_33m"])
def test_shapes_that_deviate_say_so(name: str) -> None:
    config = with_model(name, top_k=2)
    assert round(parameters(config).total / 1e6, 1) == 32.6
    text = (shipped_configs() / "model" / f"{name}.yaml").read_text()
    assert "Declared deviation" in text and "post-norm" in text


def test_the_page_lists_every_shape_with_its_size() -> None:
    page = Path(__file__).parents[3] / "docs" / "models.md"
    rows = re.findall(r"^\| `(.+)` \| `(.+)` \| (.+) \| ([\d,]+) \| ([\d,]+) \|$", page.read_text(), re.MULTILINE)
    assert sorted(name for name, *_ in rows) == names("model")
    for name, family, experts, total, active in rows:
        chosen, _, number = experts.partition(" of ")
        config = with_model(name, top_k=2 if experts == "none" else int(chosen))
        assert config.model.family == family
        assert experts == "none" or int(number) == config.model.moe.num_experts
        assert (total, active) == (f"{parameters(config).total:,}", f"{active_parameters(config):,}"), name
