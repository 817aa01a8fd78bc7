"""What moves in small steps keeps its precision in exports with a modelling file of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moe_train.interop.forms import hub_form
from moe_train.model.options import (
    MultiTokenOptions,
)
from moe_train.routing import SoftmaxTopKGate, SoftmaxTopKOptions, register_gate
from moe_train.routing.options import RouterOptions
from moe_train.routing.registry import _GATES
from moe_train.training.convert import export_model
from tests.distributed.harness.interop import forward
from tests.reference import hub
from tests.unit.interop.remote.models import (
    BIAS,
    FAMILIES,
    ROUTERS,
    VOCAB,
    Exported,
    load,
    random_model,
    saved,
)


@pytest.mark.parametrize("asked", ["auto", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_selection_bias_is_float32_everywhere(tmp_path: Path, family: str, asked: str) -> None:
    """Its steps are smaller than bfloat16 tells apart at its size (pitfalls row 12)."""
    model, router = replace(FAMILIES[family], multi_token=MultiTokenOptions()), ROUTERS["sigmoid_topk"]
    built = random_model(model, router)
    want_E = 0.5 + 0.001 * torch.randperm(8)
    if asked == "auto":
        built.to(torch.bfloat16)  # a checkpoint of weights is exported in the types that it holds
    biases = [value for name, value in built.named_buffers() if name.endswith("bias_E")]
    for bias_E in biases:
        bias_E.copy_(want_E)
    run = saved(tmp_path / "run", built, model, router, "bfloat16")
    export_model(run, tmp_path / "hub", form="custom", dtype=asked, shard_bytes=10**9)
    stored = hub.tensors(tmp_path / "hub")
    kept = {name: value for name, value in stored.items() if value.dtype == torch.float32}
    assert {name for name in stored if name.endswith("bias_E")} == set(kept) and len(kept) == len(biases) > 0
    assert all(torch.equal(value, want_E) for value in kept.values())
    for options in ({"dtype": torch.bfloat16}, {"dtype": "auto"}, {"dtype": torch.float16}):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub", trust_remote_code=True, **options)
        assert theirs.dtype == (torch.float16 if options["dtype"] == torch.float16 else torch.bfloat16)
        for moved in (theirs, theirs.to(torch.bfloat16)):
            loaded = [value for name, value in moved.named_buffers() if name.endswith("bias_E")]
            assert len(loaded) == len(biases) and all(torch.equal(value, want_E) for value in loaded)


@pytest.mark.parametrize(
    "options",
    [
        {"prototypes": "frozen", "similarity": "cross_attention"},
        {"prototypes": "ema", "similarity": "kl", "input_shift": False},
        {"similarity": "mahalanobis", "mode": "published"},
    ],
    ids=str,
)
def test_prototypes_travel(exported: Exported, options: dict[str, Any]) -> None:
    """As weights or as float32 state, with what belongs to the similarity."""
    router = RouterOptions("lpr", {"latent_dim": 4, **options})
    built, folder, _ = exported(FAMILIES["qwen3_moe"], router)
    ids_BS = torch.randint(1, VOCAB, (2, 12))
    want = forward(built, ids_BS)
    # Scores that are distances of tens of nats carry their rounding into the weights.
    bound = (1e-4 if options.get("similarity") == "kl" else 1e-5) * max(1.0, float(want.abs().max()))
    assert (load(folder)(ids_BS).logits - want).abs().max() <= bound
    kinds = dict(dtype=torch.bfloat16, trust_remote_code=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, **kinds)
    state = {name: value for name, value in theirs.named_buffers() if "prototype" in name}
    assert bool(state) == ("prototypes" in options)
    ours = [value for name, value in sorted(built.named_buffers()) if "prototype" in name]
    for value, own in zip((state[name] for name in sorted(state)), ours, strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, own)


def test_what_a_gate_moves_by_rule_is_no_weight() -> None:
    """The names whose type no export changes: the selection bias, and a gate's own buffers."""

    class Counting(SoftmaxTopKGate):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.register_buffer("seen_E", torch.zeros(self.num_experts))

    register_gate("counting", SoftmaxTopKOptions)(Counting)
    try:
        router = RouterOptions("counting", balancing=BIAS)
        layout = hub_form(FAMILIES["qwen3_moe"], router, "custom", max_length=8, dtype=torch.float32).layout
    finally:
        del _GATES["counting"]
    names = {f"decoder.layers.{layer}.mlp.router.{name}" for layer in (0, 2) for name in ("bias_E", "gate.seen_E")}
    assert layout.states == names
