"""The name table of exports with a modelling file of their own (modeling_moe_train.py)."""

from __future__ import annotations

from moe_train.interop.shapes import weight_shapes
from moe_train.interop.tables import TABLES, Part, Row
from moe_train.model.families import moe_layer_numbers
from moe_train.model.options import ModelOptions
from moe_train.routing.options import RouterOptions

_OURS = "{layer}.mlp."
_HUB = "model.layers.{layer}.mlp."
_SHARED = [
    Row(f"{_HUB}shared_experts.gate_proj.weight", f"{_OURS}shared_experts.weight1", Part.GATE),
    Row(f"{_HUB}shared_experts.up_proj.weight", f"{_OURS}shared_experts.weight1", Part.UP),
    Row(f"{_HUB}shared_experts.down_proj.weight", f"{_OURS}shared_experts.weight2"),
]
_EXPERTS = [
    Row(f"{_HUB}experts.gate_up_proj", f"{_OURS}experts.weight1"),
    Row(f"{_HUB}experts.down_proj", f"{_OURS}experts.weight2"),
    Row(f"{_HUB}bias_E", f"{_OURS}router.bias_E"),
]
_DENSE = [
    Row(f"{_HUB}gate_proj.weight", f"{_OURS}weight1", Part.GATE),
    Row(f"{_HUB}up_proj.weight", f"{_OURS}weight1", Part.UP),
    Row(f"{_HUB}down_proj.weight", f"{_OURS}weight2"),
]
_REPLACED = ("{layer}.mlp.", "mtp.")


def remote_table(model: ModelOptions, router: RouterOptions) -> list[Row]:
    """That of the family, but for what is in place of a dense layer: experts in one tensor, and the gate whatever
    parameters it has."""
    family = [row for row in TABLES[model.family] if not row.ours.startswith(_REPLACED)]
    layers = moe_layer_numbers(model)
    prefix = f"decoder.layers.{layers[0]}.mlp.router.gate." if layers else "no layer"
    gate = [name.removeprefix(prefix) for name in weight_shapes(model, router) if name.startswith(prefix)]
    rows = [Row(f"{_HUB}gate.{name}", f"{_OURS}router.gate.{name}") for name in gate]
    return [*family, *_DENSE, *rows, *_EXPERTS, *_SHARED]
