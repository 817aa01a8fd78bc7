"""transformers' Qwen3MoeForCausalLM of a geometry, with the weights of our model.

Suffixes: H hidden, E experts, F expert width, D width of a head, G key/value heads, Q query heads per key/value head,
B sequences, S tokens per sequence, K chosen experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from geometry import Geometry
from torch import Tensor, nn


def build_peer(geometry: Geometry, weights: dict[str, Tensor], experts: str, *, forced_balance: bool) -> nn.Module:
    """experts: transformers' ``experts_implementation``, "grouped_mm" or "eager". Float32 on the CPU.

    Raises SystemExit with what to install where transformers is missing or too old.
    """
    try:
        import transformers
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    except ImportError as error:
        raise SystemExit(f"transformers is missing ({error}): pip install 'moe-train[benchmark]'") from None
    if int(transformers.__version__.split(".")[0]) < 5:
        raise SystemExit(f"transformers {transformers.__version__} has no grouped_mm experts: version 5 is needed")
    g = geometry
    config = Qwen3MoeConfig(
        vocab_size=g.vocab,
        hidden_size=g.hidden,
        num_hidden_layers=g.layers,
        num_attention_heads=g.heads,
        num_key_value_heads=g.kv_heads,
        head_dim=g.head_dim,
        moe_intermediate_size=g.expert_ffn,
        num_experts=g.experts,
        num_experts_per_tok=g.top_k,
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=g.sequence,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    config._experts_implementation = experts
    model = Qwen3MoeForCausalLM(config)
    model.load_state_dict(peer_weights(weights, geometry), strict=True)
    if forced_balance:
        for layer in model.model.layers:
            layer.mlp.gate = _RoundRobinGate(layer.mlp.gate, geometry)
    return model.train()


def peer_weights(ours: dict[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
    """Our state under transformers' names and shapes. Every tensor of ours is used exactly once."""
    left = {name: tensor for name, tensor in ours.items() if tensor is not None}
    theirs = {
        "model.embed_tokens.weight": left.pop("embedding.word_embeddings.weight")[: geometry.vocab],
        "model.norm.weight": left.pop("decoder.final_layernorm.weight"),
        "lm_head.weight": left.pop("output_layer.weight")[: geometry.vocab],
    }
    for index in range(geometry.layers):
        source, target = f"decoder.layers.{index}.", f"model.layers.{index}."
        for our_name, their_name in (
            ("input_layernorm", "input_layernorm"),
            ("pre_mlp_layernorm", "post_attention_layernorm"),
            ("self_attention.linear_proj", "self_attn.o_proj"),
            ("self_attention.q_layernorm", "self_attn.q_norm"),
            ("self_attention.k_layernorm", "self_attn.k_norm"),
            ("mlp.router.gate", "mlp.gate"),
        ):
            theirs[f"{target}{their_name}.weight"] = left.pop(f"{source}{our_name}.weight")
        qkv = _split_qkv(left.pop(f"{source}self_attention.linear_qkv.weight"), geometry)
        for name, tensor in zip("qkv", qkv, strict=True):
            theirs[f"{target}self_attn.{name}_proj.weight"] = tensor
        # Ours are [E, H, 2F] and [E, F, H]; theirs are the matrices of a linear layer.
        theirs[f"{target}mlp.experts.gate_up_proj"] = left.pop(f"{source}mlp.experts.weight1")
        theirs[f"{target}mlp.experts.down_proj"] = left.pop(f"{source}mlp.experts.weight2")
    assert not left, f"not copied: {sorted(left)}"
    return theirs


def _split_qkv(weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """megatron-core interleaves per key/value head: its Q query heads, its key, its value."""
    queries = geometry.heads // geometry.kv_heads
    grouped = weight.view(geometry.kv_heads, queries + 2, geometry.head_dim, geometry.hidden)
    parts = grouped.split([queries, 1, 1], dim=1)
    q, k, v = (part.reshape(-1, geometry.hidden) for part in parts)
    return q, k, v


class _RoundRobinGate(nn.Module):
    """Their gate with our forced selection: the scores are computed, the choice is not theirs."""

    def __init__(self, gate: Any, geometry: Geometry) -> None:
        super().__init__()
        self.weight = gate.weight
        self.geometry = geometry
        self.sample_B: Tensor | None = None
        """Set before each step."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self.sample_B is not None
        g = self.geometry
        logits = F.linear(hidden.reshape(-1, g.hidden), self.weight)
        position_S = torch.arange(g.sequence, device=hidden.device)
        start_BS = position_S * g.top_k + self.sample_B.to(hidden.device)[:, None]
        offset_K = torch.arange(g.top_k, device=hidden.device)
        chosen_TK = ((start_BS.reshape(-1, 1) + offset_K) % g.experts).sort(dim=1).values
        probabilities = F.softmax(logits, dtype=torch.float, dim=-1)
        weights_TK = probabilities.gather(1, chosen_TK)
        return logits, (weights_TK / weights_TK.sum(-1, keepdim=True)).to(logits.dtype), chosen_TK


def set_samples(model: nn.Module, sample_B: Tensor) -> None:
    """Tells forced gates which samples the next batch holds."""
    for module in model.modules():
        if isinstance(module, _RoundRobinGate):
            module.sample_B = sample_B
