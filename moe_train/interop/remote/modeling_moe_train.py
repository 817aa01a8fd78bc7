"""A language model that was trained with moe_train, for transformers. Needs torch and transformers alone.

Suffixes: B batch, S tokens that are read now, L tokens in all, T = S * B tokens in the order [S, B], H hidden, N query
heads, G key/value heads, D width of a head's query and key, V of its value, P pairs that are rotated, E experts.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from moe_train.interop.remote.configuration_moe_train import MoeTrainConfig
from moe_train.routing import Gate, TokenBatch, build_gate, keep_buffers_float32

_LATENT_NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def rope_width(geometry: dict[str, Any]) -> int:
    latent = geometry.get("latent_attention")
    return int(latent["rope_head_dim"] if latent else head_dim(geometry))


def head_dim(geometry: dict[str, Any]) -> int:
    return int(geometry.get("head_dim") or geometry["hidden_size"] // geometry["num_attention_heads"])


def mscale(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary(geometry: dict[str, Any], position_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, S, P], float32."""
    width, theta = rope_width(geometry), geometry["rope_theta"]
    exponent_P = torch.arange(0, width, 2, dtype=torch.float32, device=position_BS.device) / width
    frequency_P, amplitude, scaling = 1.0 / theta**exponent_P, 1.0, geometry.get("rope_scaling")
    if scaling and scaling["kind"] == "linear":
        frequency_P = frequency_P / scaling["factor"]
    elif scaling and scaling["kind"] == "llama3":
        length_P, original = 2 * math.pi / frequency_P, scaling["original_length"]
        low, high = scaling["low_frequency_factor"], scaling["high_frequency_factor"]
        kept_P = ((original / length_P - low) / (high - low)).clamp(0.0, 1.0)
        frequency_P = (1 - kept_P) * frequency_P / scaling["factor"] + kept_P * frequency_P
    elif scaling and scaling["kind"] == "yarn":
        frequency_P, amplitude = yarn(frequency_P, theta, scaling)
    angle = position_BS[:, None, :, None].float() * frequency_P
    return angle.cos() * amplitude, angle.sin() * amplitude


def yarn(frequency_P: Tensor, theta: float, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    width, factor = 2 * len(frequency_P), scaling["factor"]
    low, high = (
        width * math.log(scaling["original_length"] / (scaling[name] * 2 * math.pi)) / (2 * math.log(theta))
        for name in ("beta_fast", "beta_slow")
    )
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    index_P = torch.arange(len(frequency_P), dtype=torch.float32, device=frequency_P.device)
    divided_P = ((index_P - low) / (high - low)).clamp(0.0, 1.0)
    amplitude = scaling.get("attention_factor")
    if amplitude is None:
        amplitude = mscale(factor)
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            amplitude = mscale(factor, scaling["mscale"]) / mscale(factor, scaling["mscale_all_dim"])
    return frequency_P / factor * divided_P + frequency_P * (1 - divided_P), amplitude


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor], interleaved: bool = False) -> Tensor:
    cos, sin = (one.to(x.dtype) for one in cos_sin)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(q_BNSD: Tensor, k_BGLD: Tensor, v_BGLV: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """[B, S, N * V]; without ``visible`` [B, 1, S, L] everything up to the own position is seen."""
    times = q_BNSD.shape[1] // k_BGLD.shape[1]
    # A static cache hands out all of its room.
    read = q_BNSD.shape[2] if visible is None else visible.shape[3]
    k, v = (x[:, :, :read] for x in (k_BGLD, v_BGLV))
    k, v = (x.repeat_interleave(times, dim=1) if times > 1 else x for x in (k, v))
    causal = visible is None
    out = F.scaled_dot_product_attention(q_BNSD, k, v, attn_mask=visible, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(2)


class GroupedAttention(nn.Module):
    def __init__(self, geometry: dict[str, Any], layer: int) -> None:
        super().__init__()
        hidden, eps = geometry["hidden_size"], geometry["norm_eps"]
        self.layer, self.width, self.clip = layer, head_dim(geometry), geometry.get("clip_qkv")
        self.heads, self.groups = geometry["num_attention_heads"], geometry["num_key_value_heads"]
        self.q_proj = linear(hidden, self.heads * self.width)
        self.k_proj = linear(hidden, self.groups * self.width)
        self.v_proj = linear(hidden, self.groups * self.width)
        self.o_proj = linear(self.heads * self.width, hidden)
        self.norm_all = geometry["family"] == "olmoe"
        self.normed = self.norm_all or geometry["family"] in ("qwen3", "qwen3_moe")
        if self.normed:
            self.q_norm = RMSNorm(self.heads * self.width if self.norm_all else self.width, eps)
            self.k_norm = RMSNorm(self.groups * self.width if self.norm_all else self.width, eps)

    def forward(self, x_BSH: Tensor, cos_sin: tuple[Tensor, Tensor], visible: Tensor | None, cache: Any) -> Tensor:
        q, k, v = self.q_proj(x_BSH), self.k_proj(x_BSH), self.v_proj(x_BSH)
        if self.norm_all:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        q, k, v = (x.unflatten(2, (-1, self.width)) for x in (q, k, v))
        if self.normed and not self.norm_all:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = rotate(q, cos_sin), rotate(k, cos_sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        return self.o_proj(attend(q, k, v, visible, self.width**-0.5))  # type: ignore[no-any-return]


class LatentAttention(nn.Module):
    def __init__(self, geometry: dict[str, Any], layer: int) -> None:
        super().__init__()
        hidden, latent, heads = geometry["hidden_size"], geometry["latent_attention"], geometry["num_attention_heads"]
        self.layer, self.latent, self.heads = layer, latent, heads
        nope, rope, value, rank = (
            latent[n] for n in ("nope_head_dim", "rope_head_dim", "value_head_dim", "key_value_rank")
        )
        if latent["query_rank"] is None:
            self.q_proj = linear(hidden, heads * (nope + rope))
        else:
            self.q_a_proj = linear(hidden, latent["query_rank"])
            self.q_a_layernorm = RMSNorm(latent["query_rank"], _LATENT_NORM_EPS)
            self.q_b_proj = linear(latent["query_rank"], heads * (nope + rope))
        self.kv_a_proj_with_mqa = linear(hidden, rank + rope)
        self.kv_a_layernorm = RMSNorm(rank, _LATENT_NORM_EPS)
        self.kv_b_proj = linear(rank, heads * (nope + value))
        self.o_proj = linear(heads * value, hidden)
        self.scale, scaling = (nope + rope) ** -0.5, geometry.get("rope_scaling")
        if scaling and scaling.get("mscale_all_dim"):
            self.scale *= mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2

    def forward(self, x_BSH: Tensor, cos_sin: tuple[Tensor, Tensor], visible: Tensor | None, cache: Any) -> Tensor:
        latent, interleaved = self.latent, self.latent["interleaved"]
        if latent["query_rank"] is None:
            q = self.q_proj(x_BSH)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSH)))
        q_BNSD = q.unflatten(2, (self.heads, -1)).transpose(1, 2)
        q_nope, q_rope = q_BNSD.split([latent["nope_head_dim"], latent["rope_head_dim"]], dim=-1)
        c, k_rope = self.kv_a_proj_with_mqa(x_BSH).split([latent["key_value_rank"], latent["rope_head_dim"]], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(c)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([latent["nope_head_dim"], latent["value_head_dim"]], dim=-1)
        k_rope = rotate(k_rope[:, None], cos_sin, interleaved).expand(-1, self.heads, -1, -1)
        q, k = torch.cat([q_nope, rotate(q_rope, cos_sin, interleaved)], -1), torch.cat([k_nope, k_rope], -1)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        return self.o_proj(attend(q, k, v, visible, self.scale))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.down_proj = linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Experts(nn.Module):
    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_TH: Tensor, weights_TE: Tensor, kept_TE: Tensor) -> Tensor:
        y_TH = torch.zeros_like(x_TH)
        for expert in kept_TE.any(0).nonzero()[:, 0].tolist():
            token = kept_TE[:, expert].nonzero()[:, 0]
            gate, up = F.linear(x_TH[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = (F.silu(gate) * up * weights_TE[token, expert, None]).to(x_TH.dtype)
            y_TH.index_add_(0, token, F.linear(inner, self.down_proj[expert]))
        return y_TH


class RoutedLayer(nn.Module):
    bias_E: Tensor | None

    def __init__(self, geometry: dict[str, Any], router: dict[str, Any], layer: int) -> None:
        super().__init__()
        hidden, moe = geometry["hidden_size"], geometry["moe"]
        self.gate = build_gate(router["gate"], router["options"], hidden, moe["num_experts"])
        self.gate.layer = layer
        biased = router["balancing"]["bias"]["rate"] > 0
        self.register_buffer("bias_E", torch.zeros(moe["num_experts"]) if biased else None)
        self.experts = Experts(moe["num_experts"], hidden, moe["expert_hidden_size"])
        shared = moe.get("shared_expert_hidden_size")
        self.shared_experts = FeedForward(hidden, shared) if shared else None

    def forward(self, x_BSH: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """The output and the gate's scores [B, S, E]."""
        x_SBH = x_BSH.transpose(0, 1)
        x_TH = x_SBH.flatten(0, 1)
        routing = self.gate(x_TH, batch, bias_E=self.bias_E)
        shift_TH = routing.expert_input_shift_TH
        shifted_TH = x_TH if shift_TH is None else x_TH + shift_TH.to(x_TH.dtype)
        y_TH = self.experts(shifted_TH, routing.weights_TE, routing.kept_TE)
        y_BSH = y_TH.view(x_SBH.shape).transpose(0, 1)
        if self.shared_experts is not None:
            y_BSH = y_BSH + self.shared_experts(x_BSH)
        return y_BSH, routing.logits_TE.view(*x_SBH.shape[:2], -1).transpose(0, 1)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        return keep_buffers_float32(self, lambda: super(RoutedLayer, self)._apply(fn, recurse))


class DecoderLayer(nn.Module):
    def __init__(self, geometry: dict[str, Any], router: dict[str, Any], layer: int) -> None:
        super().__init__()
        hidden, eps = geometry["hidden_size"], geometry["norm_eps"]
        attention = LatentAttention if geometry.get("latent_attention") else GroupedAttention
        self.self_attn = attention(geometry, layer)
        dense = layer in geometry.get("dense_layers", ())
        self.mlp = FeedForward(hidden, geometry["ffn_hidden_size"]) if dense else RoutedLayer(geometry, router, layer)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)

    def forward(
        self, x_BSH: Tensor, batch: TokenBatch, cos_sin: tuple[Tensor, Tensor], visible: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor | None]:
        x_BSH = x_BSH + self.self_attn(self.input_layernorm(x_BSH), cos_sin, visible, cache)
        normed = self.post_attention_layernorm(x_BSH)
        if isinstance(self.mlp, FeedForward):
            return x_BSH + self.mlp(normed), None
        y_BSH, logits = self.mlp(normed, batch)
        return x_BSH + y_BSH, logits


def _chosen_by(gate: Gate | None, name: str, tensor: Tensor) -> Tensor | None:
    """What the gate wants its parameter or buffer to be at the start."""
    if gate is None:
        return None
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")))
    return gate.initial(name.lstrip("."), tuple(tensor.shape), generator)


class MissingIds(Tensor):
    """In place of token ids where embeddings were given."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise ValueError("this model's gate reads token ids: input_ids are needed, inputs_embeds are not enough")


class Decoder(nn.Module):
    def __init__(self, config: MoeTrainConfig) -> None:
        super().__init__()
        geometry = config.geometry
        self.embed_tokens = nn.Embedding(config.vocab_size, geometry["hidden_size"])
        layers = range(geometry["num_layers"])
        self.layers = nn.ModuleList(DecoderLayer(geometry, config.router, layer) for layer in layers)
        self.norm = RMSNorm(geometry["hidden_size"], geometry["norm_eps"])
        # transformers sets both, by the name of the first.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None

    @property
    def recomputes(self) -> bool:
        """Whether layers are computed a second time in the backward pass."""
        return self.gradient_checkpointing and self.training


_TIED = {"lm_head.weight": "model.embed_tokens.weight"}


class MoeTrainForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    config_class = MoeTrainConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]
    _tied_weights_keys = _TIED if int(transformers.__version__.split(".")[0]) >= 5 else list(_TIED)
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: MoeTrainConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        # All buffers are states of gates, which move in steps too small for bfloat16.
        self._keep_in_fp32_modules_strict = [name for name, _ in self.named_buffers()]
        gates = [module for module in self.modules() if isinstance(module, Gate)]
        self._in_gate = {part: (gate, name) for gate in gates for name, part in gate.named_modules()}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Of ``from_config`` and of what a file lacks: as at the start of training, without the scaled residual."""
        std = self.config.geometry.get("init", {}).get("std", 0.02)
        gate, prefix = self._in_gate.get(module, (None, ""))
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            own = _chosen_by(gate, f"{prefix}.{name}", parameter)
            if own is not None:
                with torch.no_grad():
                    parameter.copy_(own)
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=std)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        for name, buffer in module.named_buffers(recurse=False):
            own = _chosen_by(gate, f"{prefix}.{name}", buffer)
            if own is not None and not getattr(buffer, "_is_hf_initialized", False):
                buffer.copy_(own)
        if isinstance(module, RoutedLayer) and module.bias_E is not None:
            nn.init.zeros_(module.bias_E)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @staticmethod
    def create_masks_for_generate(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
        """``generate`` asks for a square mask with a static cache; gates need to know which tokens are padding."""
        return attention_mask

    def _valid_auto_compile_criteria(self, *_: Any, **__: Any) -> bool:
        """Which experts have tokens, and how full the cache is, are read on the host: nothing for one graph."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **_: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """``attention_mask`` [B, L] is 0 for padding, on any side. ``router_logits``: scores [B, S, E] of each layer
        with experts. ``hidden_states`` [B, S, H]: what each layer reads, and what the head reads. The loss is the mean
        over labels that are not -100, shifted by one; with ``num_items_in_batch``, which the Trainer gives where it
        accumulates gradients, their sum divided by that. Embeddings in place of ids do where the gate reads no ids."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions; it must be [batch, tokens]")
        defaults, recomputes = self.config, self.model.recomputes
        if defaults.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("this model keeps no attention weights: leave output_attentions out")
        if recomputes and past_key_values is not None:
            raise ValueError("gradient checkpointing computes layers twice: leave past_key_values out")
        use_cache = not recomputes and (defaults.use_cache if use_cache is None else use_cache)
        return_dict = defaults.return_dict if return_dict is None else return_dict
        hidden_wanted = defaults.output_hidden_states if output_hidden_states is None else output_hidden_states
        router_wanted = defaults.output_router_logits if output_router_logits is None else output_router_logits
        x_BSH = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        ids_T = torch.empty(0).as_subclass(MissingIds) if input_ids is None else input_ids.t().flatten()
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        # A static cache counts in place.
        before = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        (batch_size, count), device = x_BSH.shape[:2], x_BSH.device
        valid_BL = torch.ones(batch_size, before + count, dtype=torch.bool, device=device)
        if attention_mask is not None:
            if attention_mask.shape[1] < before + count:
                raise ValueError(f"attention_mask has {attention_mask.shape[1]} columns for {before + count} tokens")
            valid_BL = attention_mask[:, : before + count].bool()
        elif position_ids is not None and not before and bool((position_ids.diff() != 1).any()):
            # Which transformers takes for several texts in a row that do not see each other.
            raise ValueError("position_ids do not count up by one: give each text a row of its own and attention_mask")
        if position_ids is None:
            position_ids = (valid_BL.long().cumsum(1) - 1).clamp(min=0)[:, before:]
        position_BS = position_ids.expand(batch_size, count)
        visible = None
        if before or not bool(valid_BL.all()):
            # A padding token sees itself alone, so that no row is empty.
            order_L = torch.arange(before + count, device=device)
            up_to_SL = order_L <= order_L[before:, None]
            visible = (up_to_SL & valid_BL[:, None]) | (order_L == order_L[before:, None])
            visible = visible[:, None]
        sample_B = torch.arange(batch_size, device=device)
        tokens = TokenBatch(
            ids_T=ids_T,
            sample_T=sample_B.expand(count, batch_size).flatten(),
            position_T=position_BS.t().flatten(),
            padding_T=~valid_BL[:, before:].t().flatten(),
            sequence_length=count,
            batch_size=batch_size,
        )
        cos_sin = rotary(self.config.geometry, position_BS)
        router_logits, hidden_states = [], []
        for layer in self.model.layers:
            hidden_states.append(x_BSH)
            call = functools.partial(self.model._gradient_checkpointing_func, layer.__call__) if recomputes else layer
            x_BSH, scores = call(x_BSH, tokens, cos_sin, visible, past_key_values)
            router_logits += [] if scores is None else [scores]
        x_BSH = self.model.norm(x_BSH)
        hidden_states.append(x_BSH)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x_BSH[:, keep])
        loss = None
        if labels is not None:
            scores, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
            if num_items_in_batch is None:
                loss = F.cross_entropy(scores, targets)
            else:
                total = F.cross_entropy(scores, targets, reduction="sum")
                loss = total / torch.as_tensor(num_items_in_batch, device=total.device)
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(hidden_states) if hidden_wanted else None,
            router_logits=tuple(router_logits) if router_wanted else None,
        )
        return output if return_dict else output.to_tuple()  # type: ignore[no-any-return]
