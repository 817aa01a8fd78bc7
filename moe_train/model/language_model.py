"""Builds megatron-core's GPTModel with our parts injected: norm, attention, MoE layer, head.

Suffixes: S sequence, B batch, H hidden.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.model.attention import ScaledDotProductAttention
from moe_train.model.head import LanguageModelHead
from moe_train.model.initialization import initialize_weights
from moe_train.model.micro_batch import current
from moe_train.model.moe_layer import MoELayer
from moe_train.model.norm import RMSNorm
from moe_train.model.options import ModelOptions
from moe_train.model.recompute import RecomputedLayer
from moe_train.model.upstream import (
    AttnMaskType,
    ColumnParallelLinear,
    GPTModel,
    ModuleSpec,
    ProcessGroupCollection,
    RowParallelLinear,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
)
from moe_train.routing.options import RouterOptions


class LanguageModel(GPTModel):
    """GPTModel whose head computes the loss itself."""

    def forward(  # type: ignore[override]
        self, ids_BS: Tensor, labels_BS: Tensor | None = None, target_BS: Tensor | None = None
    ) -> Any:
        """Sum of negative log-likelihoods and each token's own [B, S]; without labels the logits [B, S, V].

        Must be called inside ``with use(micro_batch)``.
        """
        position_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
        return super().forward(ids_BS, position_BS, None, labels=labels_BS, loss_mask=target_BS)

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Upstream's, with rotary positions that restart at each text: [S, 1, 1, D] becomes [S, B, 1, D]."""
        hidden, rotary, *rest = super()._preprocess(*args, **kwargs)
        texts = current().texts
        if texts is not None:
            rotary = rotary[texts.position_SB].squeeze(2)
        return hidden, rotary, *rest

    def _postprocess(self, hidden_states: Tensor, labels: Any, loss_mask: Any = None, **_: Any) -> Any:
        return self.output_layer(hidden_states, labels, loss_mask)


def padded_vocab_size(options: ModelOptions) -> int:
    """Rows of the embedding."""
    return math.ceil(options.vocab_size / options.vocab_multiple) * options.vocab_multiple


def build_language_model(
    options: ModelOptions, router: RouterOptions, *, sequence_length: int, seed: int, recompute: bool = False
) -> LanguageModel:
    """The model of this rank, float32 on the CPU, initialised by (seed, global name, global expert index).

    The process groups must exist (parallel.initialize).
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    experts, ranks = options.moe.num_experts, groups.ep.size()
    if experts % ranks:
        raise ValueError(f"model.moe.num_experts = {experts} is not divisible by parallel.expert = {ranks}")
    config = _transformer_config(options, groups.ep.size())
    layer = _layer_spec(options, router, groups, RecomputedLayer if recompute else TransformerLayer)
    model = LanguageModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[layer] * options.num_layers, layer_norm=RMSNorm),
        vocab_size=padded_vocab_size(options),
        max_sequence_length=sequence_length,
        position_embedding_type="rope",
        rotary_base=options.rope_theta,  # type: ignore[arg-type]
        share_embeddings_and_output_weights=options.tie_embeddings,
        pg_collection=groups,
    )
    embedding = model.embedding.word_embeddings.weight
    weight = embedding if options.tie_embeddings else nn.Parameter(torch.empty_like(embedding))
    model.output_layer = LanguageModelHead(weight, options.vocab_size, options.loss_chunk_tokens)
    initialize_weights(model, options, seed)
    return model


def _transformer_config(options: ModelOptions, expert_parallel_size: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.num_attention_heads,
        num_query_groups=options.num_key_value_heads,
        kv_channels=options.head_dim or options.hidden_size // options.num_attention_heads,
        ffn_hidden_size=options.moe.shared_expert_hidden_size or options.moe.expert_hidden_size,
        moe_ffn_hidden_size=options.moe.expert_hidden_size,
        num_moe_experts=options.moe.num_experts,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        expert_model_parallel_size=expert_parallel_size,
        layernorm_epsilon=options.norm_eps,
        normalization="RMSNorm",
        qk_layernorm=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        moe_permute_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],
    )


def _layer_spec(options: ModelOptions, router: RouterOptions, groups: Any, layer: type) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ScaledDotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm,
            k_layernorm=RMSNorm,
        ),
    )
    moe = ModuleSpec(module=MoELayer, params={"moe": options.moe, "router": router, "pg_collection": groups})
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=moe,
            mlp_bda=get_bias_dropout_add,
        ),
    )
