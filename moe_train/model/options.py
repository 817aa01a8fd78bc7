"""Options of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class InitOptions:
    """Initial weights: normal(0, std), a function of (seed, global name, global expert index) only."""

    std: float = 0.02
    scaled_residual: bool = True
    """Divide std by sqrt(2 * num_layers) for the matrices that write into the residual stream."""


@dataclass(frozen=True)
class MoEOptions:
    num_experts: int = 8
    expert_hidden_size: int = 128
    """Inner width of one expert."""
    shared_expert_hidden_size: int | None = None
    """Inner width of the shared expert that every token passes; null for none."""
    experts: Literal["grouped", "reference"] = "grouped"
    """grouped: one grouped matrix multiplication; reference: a plain loop over the experts."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer texts than a model was first trained on.

    linear: all divided by ``factor`` (Chen et al. 2023). llama3: long wavelengths divided, short ones kept, between
    them a mixture (Llama 3.1). yarn: Peng et al. 2023.
    """

    kind: Literal["linear", "llama3", "yarn"] = "linear"
    factor: float = 1.0
    original_length: int = 4096
    """Length in tokens that the model was first trained on."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above original_length / this are divided."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original_length / this are kept."""
    beta_fast: float = 32.0
    """yarn: frequencies with more rotations than this over original_length are kept."""
    beta_slow: float = 1.0
    """yarn: frequencies with fewer rotations than this are divided."""
    truncate: bool = True
    """yarn: round the bounds between both to whole dimensions."""
    attention_factor: float | None = None
    """yarn: factor on cosine and sine; null computes it from ``factor`` and the two below."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """yarn: deepseek_v3 also scales the scores of attention by it."""


@dataclass(frozen=True)
class LatentAttentionOptions:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries, keys and values by way of small spaces."""

    query_rank: int | None = 1536
    """Width of the queries' space; null: queries are projected directly."""
    key_value_rank: int = 512
    nope_head_dim: int = 128
    """Part of a query's and key's head without position."""
    rope_head_dim: int = 64
    """Part with rotary position; the key's is shared by all heads."""
    value_head_dim: int = 128
    interleaved: bool = True
    """Rotate neighbouring elements (0, 1), (2, 3), …; false: element i with i + rope_head_dim / 2."""


@dataclass(frozen=True)
class MultiTokenOptions:
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one more layer that sees the next token and
    predicts the one behind it."""

    layers: Literal[0, 1] = 0
    coefficient: float = 0.3
    """Weight of its loss, a mean over its own targets. It is trained with, and left out of evaluation."""


@dataclass(frozen=True)
class ModelOptions:
    family: Literal["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "qwen3", "llama3"] = "qwen3_moe"
    """What attention is like and whether there are experts (model/families.py)."""
    num_layers: int = 4
    hidden_size: int = 256
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int | None = None
    """Width of one head; null means hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = None
    """Inner width of layers without experts."""
    dense_layers: list[int] = field(default_factory=list)
    """Layers (from 0) without experts in a family that has them; a dense family has none anyway."""
    vocab_size: int = 8192
    """True size of the vocabulary; must hold every id of the tokenizer."""
    vocab_multiple: int = 64
    """The embedding is padded up to a multiple of this; padding rows are masked, not counted and not exported."""
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    clip_qkv: float | None = None
    """olmoe: queries, keys and values are cut to [-this, this]."""
    latent_attention: LatentAttentionOptions | None = None
    """deepseek_v3 has it, with these widths in place of head_dim and num_key_value_heads."""
    multi_token: MultiTokenOptions = field(default_factory=MultiTokenOptions)
    moe: MoEOptions = field(default_factory=MoEOptions)
    init: InitOptions = field(default_factory=InitOptions)
    loss_chunk_tokens: int | None = None
    """Tokens whose logits exist at one time; null chooses by device and vocabulary."""
