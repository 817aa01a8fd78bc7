"""Random models of every family, made and saved by transformers: what comes from the hub, but small.

Weights are large enough that experts, routing and position matter, norms and selection biases are not what they start
from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB = 101
LENGTH = 24
_DENSE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
_MOE = {**_DENSE, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
_MIXTRAL = {
    **_DENSE,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e3},
}
_OLMOE = {**_DENSE, "num_experts": 8, "num_experts_per_tok": 3}
_LATENT = {
    **_DENSE,
    "num_key_value_heads": 6,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}


@dataclass(frozen=True)
class Hub:
    """A model's configuration and how it is saved."""

    kind: str
    """Name of transformers' classes: <kind>Config, <kind>ForCausalLM."""
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "5GB"


MODELS = {
    "mixtral": Hub("Mixtral", _MIXTRAL),
    "mixtral_heads_linear_shards": Hub(
        "Mixtral",
        {**_MIXTRAL, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 14,
         "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        max_shard_size="60KB",
    ),
    "qwen3_moe": Hub("Qwen3Moe", {**_MOE, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe_tied_mixed_yarn": Hub(
        "Qwen3Moe",
        {**_MOE, "tie_word_embeddings": True, "mlp_only_layers": [2], "rope_parameters": _YARN},
    ),
    "qwen3_moe_sparse_step_bf16_shards": Hub(
        "Qwen3Moe", {**_MOE, "decoder_sparse_step": 2, "norm_topk_prob": True, "head_dim": 8}, torch.bfloat16, "50KB"
    ),
    "olmoe": Hub("Olmoe", {**_OLMOE, "clip_qkv": 0.4}),
    "olmoe_tied_bf16": Hub(
        "Olmoe",
        {**_OLMOE, "num_key_value_heads": 6, "norm_topk_prob": True, "tie_word_embeddings": True},
        torch.bfloat16,
    ),
    "deepseek_v3": Hub("DeepseekV3", _LATENT),
    "deepseek_v3_yarn_bf16": Hub(
        "DeepseekV3",
        {**_LATENT, "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7}, "n_shared_experts": 2},
        torch.bfloat16,
        "60KB",
    ),
    "deepseek_v3_plain_queries_halves": Hub(
        "DeepseekV3",
        {**_LATENT, "q_lora_rank": None, "rope_interleave": False, "n_group": 1, "topk_group": 1,
         "norm_topk_prob": False, "routed_scaling_factor": 1.5, "first_k_dense_replace": 0},
    ),
    "qwen3": Hub("Qwen3", {**_DENSE, "head_dim": 10}),
    "qwen3_tied_bf16": Hub("Qwen3", {**_DENSE, "head_dim": 8, "tie_word_embeddings": True}, torch.bfloat16, "40KB"),
    "llama3": Hub("Llama", {**_DENSE, "rope_parameters": _LLAMA3}),
    "llama3_tied_heads_bf16": Hub(
        "Llama",
        {**_DENSE, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": True},
        torch.bfloat16,
    ),
}  # fmt: skip


def make(folder: Path, hub: Hub, seed: int) -> None:
    """Saves a random model."""
    import transformers

    config = getattr(transformers, f"{hub.kind}Config")(**hub.config)
    model = getattr(transformers, f"{hub.kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *_biases(model)]:
            # Where the embedding is the head, logits shall be of a size around 1 as well.
            large = "embed_tokens" in name and not config.tie_word_embeddings
            value.copy_(_random(name, value.shape, generator, large))
    if hub.dtype != torch.float32:
        exact = _biases(model)
        model = model.to(hub.dtype)
        for name, bias in exact:  # stays float32 in what is published
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, torch.nn.Buffer(bias))
        model.config.dtype = hub.dtype
    model.save_pretrained(folder, max_shard_size=hub.max_shard_size)


def _biases(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, b) for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]


def _random(name: str, shape: torch.Size, generator: torch.Generator, large: bool) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return noise * 0.2
    if len(shape) == 1:
        return 1 + 0.3 * noise
    return noise if large else noise * shape[-1] ** -0.5


def tensors(folder: Path) -> dict[str, Tensor]:
    """Everything in the safetensors files of a folder, by the format's own library."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether names, types, shapes and bytes are equal."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape
        and torch.equal(a[n].contiguous().view(-1).view(torch.uint8), b[n].contiguous().view(-1).view(torch.uint8))
        for n in a
    )  # fmt: skip


def logits(folder: Path, ids_BS: Tensor, custom: bool = False) -> Tensor:
    """What transformers computes in float32, without a warning about a tensor that is missing or left over; with
    ``custom`` by the modelling file in the folder."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=custom
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        return model.eval()(ids_BS).logits  # type: ignore[no-any-return]


def greedy(folder: Path, prompts: list[list[int]], count: int) -> tuple[list[list[int]], list[int]]:
    """What transformers' generate() puts behind each prompt, and how many tokens of it are certain: up to the first one
    that leads by less than 1e-4."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts, certain = [], []
    for prompt in prompts:
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(made.logits, dim=1)[0].topk(2).values
        close = (best[:, 0] - best[:, 1] < 1e-4).nonzero().flatten().tolist()
        texts.append(made.sequences[0, len(prompt) :].tolist())
        certain.append(close[0] if close else count)
    return texts, certain


def compared_config(folder: Path) -> dict[str, Any]:
    """config.json as transformers reads it."""
    from transformers import AutoConfig

    return dict(AutoConfig.from_pretrained(folder).to_dict())


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; a value of ... removes one."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def save(folder: Path, content: dict[str, Tensor]) -> None:
    """As one file."""
    from safetensors.torch import save_file

    save_file({n: t.contiguous() for n, t in content.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def with_next_token_layer(content: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """DeepSeek's layout: a layer behind the last one, and copies of embedding and head."""
    generator = torch.Generator().manual_seed(seed)
    last, added = "model.layers.2.", "model.layers.3."
    more = {n.replace(last, added): torch.randn(t.shape, generator=generator) for n, t in content.items() if last in n}
    hidden = content["model.norm.weight"].shape[0]
    more |= {
        f"{added}{n}.weight": torch.randn(hidden, generator=generator) for n in ("enorm", "hnorm", "shared_head.norm")
    }
    more[f"{added}eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator)
    more[f"{added}embed_tokens.weight"] = content["model.embed_tokens.weight"].clone()
    more[f"{added}shared_head.head.weight"] = content["lm_head.weight"].clone()
    return content | more
