"""What lies beside the weights of an export with a modelling file of its own: configuration and code."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from moe_train.data.files import write_atomically
from moe_train.interop.remote.bundle import bundle
from moe_train.model.families import family_of
from moe_train.model.options import ModelOptions
from moe_train.routing.options import RouterOptions

CLASS = "MoeTrainForCausalLM"


def remote_config(model: ModelOptions, router: RouterOptions, *, max_length: int, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    geometry = asdict(model)
    if not family_of(model).experts:
        # Our options leave the list empty in a dense family; the modelling file knows no families.
        geometry["dense_layers"] = list(range(model.num_layers))
    return {
        "architectures": [CLASS],
        "auto_map": {
            "AutoConfig": "configuration_moe_train.MoeTrainConfig",
            "AutoModelForCausalLM": f"modeling_moe_train.{CLASS}",
        },
        "model_type": "moe_train",
        "geometry": geometry,
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
    home, code = files("moe_train.interop.remote"), bundle(gate).encode()
    # transformers keeps modules by their content and classes of models by that of their configuration: with another
    # gate none of the files may be the same.
    routing = f"routing_{gate}_{hashlib.sha256(code).hexdigest()[:8]}"
    modeling = (home / "modeling_moe_train.py").read_text(encoding="utf-8")
    imports = {
        "from moe_train.interop.remote.configuration_moe_train import": "from .configuration_moe_train import",
        "from moe_train.routing import": f"from .{routing} import",
    }
    for ours, theirs in imports.items():
        assert modeling.count(ours) == 1, ours
        modeling = modeling.replace(ours, theirs)
    configuration = (home / "configuration_moe_train.py").read_text(encoding="utf-8")
    for name, source in (("modeling", modeling), ("configuration", configuration)):
        text = f"# Goes with {routing}.py. Written by `moe-train convert export`.\n{source}"
        write_atomically(folder / f"{name}_moe_train.py", text.encode())
    write_atomically(folder / f"{routing}.py", code)
