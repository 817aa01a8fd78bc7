"""What lies beside the weights of an export with a modelling file of its own: configuration and code."""

from __future__ import annotations

from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from moe_train.data.files import write_atomically
from moe_train.interop.remote.bundle import bundle
from moe_train.model.options import ModelOptions
from moe_train.routing.options import RouterOptions

CLASS = "MoeTrainForCausalLM"
_IMPORTS = {
    "from moe_train.interop.remote.configuration_moe_train import": "from .configuration_moe_train import",
    "from moe_train.routing import": "from .routing_moe_train import",
}


def remote_config(model: ModelOptions, router: RouterOptions, *, max_length: int, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": [CLASS],
        "auto_map": {
            "AutoConfig": "configuration_moe_train.MoeTrainConfig",
            "AutoModelForCausalLM": f"modeling_moe_train.{CLASS}",
        },
        "model_type": "moe_train",
        "geometry": asdict(model),
        "router": asdict(router),
        "max_position_embeddings": max_length,
        "tie_word_embeddings": model.tie_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def write_code(gate: str, folder: Path) -> None:
    """The modelling file, the class of its configuration, and the gate. Errors: ValueError of ``bundle``, OSError."""
    home = files("moe_train.interop.remote")
    modeling = (home / "modeling_moe_train.py").read_text(encoding="utf-8")
    for ours, theirs in _IMPORTS.items():
        assert modeling.count(ours) == 1, ours
        modeling = modeling.replace(ours, theirs)
    configuration = (home / "configuration_moe_train.py").read_text(encoding="utf-8")
    write_atomically(folder / "modeling_moe_train.py", modeling.encode())
    write_atomically(folder / "configuration_moe_train.py", configuration.encode())
    write_atomically(folder / "routing_moe_train.py", bundle(gate).encode())
