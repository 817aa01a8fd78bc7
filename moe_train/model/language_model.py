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
from moe_train.model.families import family_of, head_width, moe_layer_numbers
from moe_train.model.feed_forward import DenseLayer
from moe_train.model.grouped_attention import GroupedAttention
from moe_train.model.head import LanguageModelHead
from moe_train.model.initialization import initialize_weights
from moe_train.model.latent_attention import LatentAttention
from moe_train.model.micro_batch import attach_losses, current
from moe_train.model.moe_layer import MoELayer
from moe_train.model.multi_token import UNIT, MultiTokenPrediction, multi_token_labels, multi_token_targets
from moe_train.model.norm import RMSNorm
from moe_train.model.options import ModelOptions
from moe_train.model.recompute import RecomputedLayer
from moe_train.model.rotary import Rotary
from moe_train.model.sequence_parallel import SequenceParallel
from moe_train.model.upstream import (
    AttnMaskType,
    ColumnParallelLinear,
    GPTModel,
    ModuleSpec,
    ProcessGroupCollection,
    RowParallelLinear,
    SelfAttentionSubmodules,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    build_module,
    get_bias_dropout_add,
)
from moe_train.routing.interface import LossTerm
from moe_train.routing.options import RouterOptions


class LanguageModel(GPTModel):
    """GPTModel whose head computes the loss itself, with rotary positions of our own."""

    rotary: Rotary
    sequence: SequenceParallel
    mtp: MultiTokenPrediction | None
    mtp_coefficient: float

    def forward(  # type: ignore[override]
        self, ids_BS: Tensor, labels_BS: Tensor | None = None, target_BS: Tensor | None = None
    ) -> Any:
        """Sum of negative log-likelihoods and each token's own [B, S]; without labels the logits [B, S, V], or
        [B, 1, V] where the micro-batch names one position of each sequence.

        Must be called inside ``with use(micro_batch)``.
        """
        return super().forward(ids_BS, None, None, labels=labels_BS, loss_mask=target_BS)

    def _preprocess(self, input_ids: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
        """Hidden states of this rank's positions, cosines and sines of all rotary positions [2, S, B or 1, 1, P], and
        upstream's blanks."""
        hidden_sBH = self.embedding(input_ids=self.sequence.own(input_ids, dim=1), position_ids=None)
        return hidden_sBH, self.rotary(self._positions(input_ids), hidden_sBH.dtype), None, None, None, None

    def _positions(self, ids_BS: Tensor) -> Tensor:
        """[S, B or 1]: from 0 in each sequence, or in each text, or behind what a cache holds."""
        micro_batch, length = current(), ids_BS.shape[1]
        if micro_batch.texts is not None:
            return micro_batch.texts.position_SB
        if micro_batch.cache is not None:
            return micro_batch.cache.positions(length)
        return torch.arange(length, device=ids_BS.device)[:, None]

    def _postprocess(
        self, hidden_states: Tensor, labels: Any, loss_mask: Any = None, *, rotary_pos_emb: Tensor, **_: Any
    ) -> Any:
        if labels is None:
            hidden_states = self.sequence.gather(hidden_states)
            if (position_B := current().predict_B) is not None:
                hidden_states = hidden_states[position_B, torch.arange(len(position_B), device=position_B.device)][None]
            return self.output_layer(hidden_states)
        own = [self.sequence.own(x_BS, dim=1) for x_BS in (labels, loss_mask)]
        nll_sum, nll_Bs = self.output_layer(hidden_states, *own)
        nll_sum, nll_BS = self.sequence.total(nll_sum), self.sequence.join(nll_Bs)
        if self.mtp is None or current().totals is None:
            return nll_sum, nll_BS
        return self._with_multi_token(nll_sum, hidden_states, labels, loss_mask, rotary_pos_emb), nll_BS

    def _with_multi_token(
        self, nll_sum: Tensor, hidden_SBH: Tensor, labels_BS: Tensor, target_BS: Tensor, angles_2SB1P: Tensor
    ) -> Tensor:
        """The language loss with the gradient of the other loss attached; that one is noted with the layer's own."""
        assert self.mtp is not None
        micro_batch = current()
        position_BS = None if micro_batch.texts is None else micro_batch.texts.position_SB.t()
        further_BS = multi_token_targets(target_BS, position_BS)
        # The label of a position is its next token, also at the end of a sequence and where it is no target.
        next_SBH = self.embedding(input_ids=labels_BS, position_ids=None)
        hidden_SBH = self.mtp(next_SBH, hidden_SBH, angles_2SB1P)
        further_sum, _ = self.output_layer(hidden_SBH, multi_token_labels(labels_BS), further_BS)
        term = LossTerm(further_sum, further_BS.sum(), UNIT, self.mtp_coefficient)
        noted = LossTerm(further_sum.detach(), term.count, UNIT, term.coefficient)
        micro_batch.losses.setdefault(self.mtp.number, {})[UNIT] = noted
        return attach_losses(nll_sum, {UNIT: term}, micro_batch)


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
    if family_of(options).experts and experts % ranks:
        raise ValueError(f"model.moe.num_experts = {experts} is not divisible by parallel.expert = {ranks}")
    config = _transformer_config(options, ranks, groups.tp.size())
    layer = RecomputedLayer if recompute else TransformerLayer
    with_experts = moe_layer_numbers(options)
    specs = [
        _layer_spec(options, router, groups, layer, n in with_experts)
        for n in range(options.num_layers + options.multi_token.layers)
    ]
    model = LanguageModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=specs[: options.num_layers], layer_norm=RMSNorm),
        vocab_size=groups.tp.size(),  # of an embedding that is replaced: upstream would divide it among the ranks
        scatter_embedding_sequence_parallel=False,
        max_sequence_length=sequence_length,
        position_embedding_type="none",  # type: ignore[arg-type]
        share_embeddings_and_output_weights=options.tie_embeddings,
        pg_collection=groups,
    )
    model.rotary = Rotary(options)
    model.sequence = SequenceParallel(groups.tp)
    model.embedding.word_embeddings = nn.Embedding(padded_vocab_size(options), options.hidden_size)
    embedding = model.embedding.word_embeddings.weight
    weight = embedding if options.tie_embeddings else nn.Parameter(torch.empty_like(embedding))
    model.output_layer = LanguageModelHead(weight, options.vocab_size, options.loss_chunk_tokens)
    model.mtp = None
    if options.multi_token.layers:
        number = options.num_layers
        further = build_module(specs[number], config=config, layer_number=number + 1, pg_collection=groups)
        model.mtp = MultiTokenPrediction(config, further, number)
        model.mtp_coefficient = options.multi_token.coefficient
    initialize_weights(model, options, seed)
    return model


def _transformer_config(options: ModelOptions, expert_ranks: int, tensor_ranks: int) -> TransformerConfig:
    experts = family_of(options).experts
    return TransformerConfig(
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.num_attention_heads,
        num_query_groups=options.num_key_value_heads,
        kv_channels=head_width(options),
        ffn_hidden_size=options.ffn_hidden_size or options.moe.expert_hidden_size,
        # Upstream refuses a width of experts where there are none.
        moe_ffn_hidden_size=options.moe.expert_hidden_size if experts else None,
        num_moe_experts=options.moe.num_experts if experts else None,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        expert_model_parallel_size=expert_ranks,
        tensor_model_parallel_size=tensor_ranks,
        expert_tensor_parallel_size=1,
        sequence_parallel=tensor_ranks > 1,
        layernorm_epsilon=options.norm_eps,
        normalization="RMSNorm",
        qk_layernorm=family_of(options).query_key_norm == "head",
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


def _layer_spec(
    options: ModelOptions, router: RouterOptions, groups: Any, layer: type, with_experts: bool
) -> ModuleSpec:
    if with_experts:
        mlp = ModuleSpec(module=MoELayer, params={"moe": options.moe, "router": router, "pg_collection": groups})
    else:
        mlp = ModuleSpec(module=DenseLayer, params={"width": options.ffn_hidden_size, "group": groups.tp})
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=_attention_spec(options),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention_spec(options: ModelOptions) -> ModuleSpec:
    family = family_of(options)
    if family.latent_attention:
        return ModuleSpec(module=LatentAttention, params={"options": options, "core": ScaledDotProductAttention})
    head_norm = RMSNorm if family.query_key_norm == "head" else None
    return ModuleSpec(
        module=GroupedAttention,
        params={"options": options, "attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ScaledDotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
