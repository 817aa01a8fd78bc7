"""Any value of the wrong type in a config.json is an error that names its key, or changes nothing."""

from __future__ import annotations

import dataclasses
import json
import random
import secrets
from pathlib import Path
from typing import Any

import pytest

from moe_train.interop.config_import import from_hub
from moe_train.interop.importing import layout_of
from moe_train.interop.keys import CLASSES
from moe_train.training.run_config import RunConfig, from_dict, to_dict
from tests.reference import hub

WRONG: list[Any] = [None, "x", "8", -1, 0, True, 1.5, 1e30, float("nan"), [], [1], [None], [[]], {}, {"a": 1}]
ROPE_KEYS = (
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "beta_fast",
    "high_freq_factor", "mscale", "truncate", "attention_factor", "partial_rotary_factor",
)  # fmt: skip
OTHER_KEYS = (
    "rope_theta", "rope_scaling", "sliding_window", "use_sliding_window", "layer_types", "auto_map",
    "quantization_config", "partial_rotary_factor", "num_local_experts", "max_position_embeddings",
)  # fmt: skip
FINE: set[str] = set()


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    import transformers

    found = {}
    for name, model in hub.MODELS.items():
        folder: Path = tmp_path_factory.mktemp(name)
        getattr(transformers, f"{model.kind}Config")(**model.config).save_pretrained(folder)
        found[name] = json.loads((folder / "config.json").read_text())
    return found


def problem(content: dict[str, Any]) -> str:
    """What an import says of it before anything is written; empty where all is well."""
    try:
        found = from_hub(content)
        if repr(found) not in FINE:  # the keys that change nothing make most of them equal
            layout_of(found, "config.json, as our options")
            config = dataclasses.replace(RunConfig(), model=found.model, router=found.router)
            from_dict(to_dict(config), source="config.json, as our options")
            FINE.add(repr(found))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", [name for name in hub.MODELS if name in CLASSES])  # one of each family
def test_every_key(configs: dict[str, dict[str, Any]], name: str) -> None:
    config = configs[name]
    for key in {*config, *OTHER_KEYS}:
        for value in WRONG:
            message = problem({**config, key: value})
            named = key in message or "as our options" in message
            assert not message or ("config.json" in message and named), f"{key} = {value!r}: {message}"


@pytest.mark.parametrize("name", [name for name, model in hub.MODELS.items() if "rope_parameters" in model.config])
def test_every_key_of_rope(configs: dict[str, dict[str, Any]], name: str) -> None:
    config = configs[name]
    for key in ROPE_KEYS:
        for value in WRONG:
            message = problem({**config, "rope_parameters": {**config["rope_parameters"], key: value}})
            named = key in message or "as our options" in message
            assert not message or ("config.json" in message and named), f"{key} = {value!r}: {message}"


def test_several_at_once(configs: dict[str, dict[str, Any]]) -> None:
    seed = secrets.randbits(31)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(500):
        config = dict(configs[chance.choice(list(configs))])
        for key in chance.choices([*config, *OTHER_KEYS], k=chance.randint(1, 4)):
            config[key] = chance.choice(WRONG)
        problem(config)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("qwen3_moe", "rms_norm_eps", None),
        ("deepseek_v3", "routed_scaling_factor", None),
        ("qwen3_moe", "rope_parameters", -1),
        ("qwen3_moe", "mlp_only_layers", "x"),
        ("qwen3", "layer_types", -1),
        ("deepseek_v3", "first_k_dense_replace", "x"),
        ("deepseek_v3", "q_lora_rank", "x"),
        ("deepseek_v3", "n_shared_experts", "2"),
        ("deepseek_v3", "n_group", [1]),
        ("deepseek_v3", "num_nextn_predict_layers", "1"),
        ("mixtral", "sliding_window", "x"),
        ("mixtral", "model_type", []),
        ("llama3", "head_dim", "x"),
        ("llama3", "num_key_value_heads", 1.5),
        ("olmoe", "clip_qkv", "x"),
        ("olmoe", "tie_word_embeddings", "false"),
        ("llama3", "auto_map", "x"),
        ("llama3", "quantization_config", -1),
        ("llama3", "rope_theta", "x"),
    ],
)
def test_key_and_value_are_named(configs: dict[str, dict[str, Any]], name: str, key: str, value: Any) -> None:
    config = configs[name]
    if key == "rope_theta":
        del config["rope_parameters"]
    message = problem({**config, key: value})
    assert "config.json" in message and key in message and repr(value) in message, message


@pytest.mark.parametrize(("value", "interleaved"), [(True, True), (False, False), (None, False), (..., True)])
def test_how_deepseek_pairs_channels(configs: dict[str, dict[str, Any]], value: bool | None, interleaved: bool) -> None:
    """As transformers: whether the value is true; true where it is missing."""
    config = {**configs["deepseek_v3"], "rope_interleave": value}
    if value is ...:
        del config["rope_interleave"]
    latent = from_hub(config).model.latent_attention
    assert latent is not None and latent.interleaved is interleaved
