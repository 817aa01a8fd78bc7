"""Keys of a config.json: model types, values that hold where a key is missing, and keys that change no output."""

from __future__ import annotations

from typing import Any

FAMILY_OF_TYPE = {
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
    "olmoe": "olmoe",
    "deepseek_v3": "deepseek_v3",
    "qwen3": "qwen3",
    "llama": "llama3",
}
TYPE_OF_FAMILY = {family: kind for kind, family in FAMILY_OF_TYPE.items()}
CLASSES = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama3": "LlamaForCausalLM",
}

_COMMON: dict[str, Any] = {"hidden_act": "silu", "tie_word_embeddings": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {**_COMMON, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8, "num_local_experts": 8,
                "num_experts_per_tok": 2, "max_position_embeddings": 131072},
    "qwen3_moe": {**_COMMON, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "num_key_value_heads": 4, "num_experts": 128,
                  "num_experts_per_tok": 8, "norm_topk_prob": False, "decoder_sparse_step": 1,
                  "moe_intermediate_size": 768, "max_position_embeddings": 32768},
    "olmoe": {**_COMMON, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "num_experts": 64, "num_experts_per_tok": 8,
              "norm_topk_prob": False, "max_position_embeddings": 4096},
    "deepseek_v3": {**_COMMON, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "n_routed_experts": 256, "n_shared_experts": 1,
                    "num_experts_per_tok": 8, "norm_topk_prob": True, "n_group": 8, "topk_group": 4,
                    "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512,
                    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "rope_interleave": True,
                    "moe_intermediate_size": 2048, "max_position_embeddings": 4096, "num_nextn_predict_layers": 1},
    "qwen3": {**_COMMON, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "num_key_value_heads": 32, "head_dim": 128,
              "max_position_embeddings": 32768},
    "llama3": {**_COMMON, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048},
}  # fmt: skip
"""What transformers 5 takes where a key is missing (the configuration classes of its models)."""

ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "moe_layer_freq": (1, None),
    "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
    "use_sliding_window": (False, None),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
}
"""The only values that our models can do, for keys that would change the function otherwise."""

WITHOUT_EFFECT = frozenset(
    """_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation
    aux_loss_alpha bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id ep_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range label2id length_penalty max_length max_position_embeddings max_window_layers min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type
    quantization_config remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    router_aux_loss_coef router_jitter_noise sep_token_id seq_aux suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache""".split()
)
"""Keys that change no logits of a text, or (max_position_embeddings, quantization_config) are read elsewhere."""
DTYPE_KEYS = ("dtype", "torch_dtype")
"""Names of the type of the weights, the newer one first."""
