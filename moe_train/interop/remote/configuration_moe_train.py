"""Configuration of a model that was trained with moe_train and that no class of transformers expresses."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MoeTrainConfig(PretrainedConfig):  # type: ignore[misc]
    """``geometry`` and ``router`` are the sections `model` and `router` of moe_train's configuration. ``vocab_size``:
    where it was changed since, by `resize_token_embeddings`."""

    model_type = "moe_train"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        geometry: dict[str, Any] | None = None,
        router: dict[str, Any] | None = None,
        use_cache: bool = True,
        output_router_logits: bool = False,
        vocab_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.geometry = geometry or {}
        self.router = router or {}
        self.use_cache = use_cache
        self.output_router_logits = output_router_logits
        # What caches and tools of transformers look for.
        self.vocab_size = self.geometry.get("vocab_size", 0) if vocab_size is None else vocab_size
        self.hidden_size = self.geometry.get("hidden_size", 0)
        self.num_hidden_layers = self.geometry.get("num_layers", 0)
        self.num_attention_heads = self.geometry.get("num_attention_heads", 1)
        self.num_key_value_heads = self.geometry.get("num_key_value_heads", self.num_attention_heads)
        kwargs.setdefault("tie_word_embeddings", self.geometry.get("tie_embeddings", False))
        super().__init__(**kwargs)
