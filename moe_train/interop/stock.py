"""Whether a class that transformers ships computes what a configuration of ours computes."""

from __future__ import annotations

from typing import Any

from moe_train.model.families import family_of
from moe_train.model.options import ModelOptions
from moe_train.routing.options import RouterOptions
from moe_train.routing.registry import gate_options
from moe_train.routing.strict import parse_options


def stock_class_problems(model: ModelOptions, router: RouterOptions) -> list[str]:
    """Why no class of transformers itself can hold this model, each in a sentence with the key; empty where one can."""
    if not family_of(model).experts:
        return []
    problems = []
    name, bias = model.family, router.balancing.bias.rate > 0
    gate = "sigmoid_topk" if name == "deepseek_v3" else "softmax_topk"
    if router.gate != gate:
        problems.append(f"router.gate is {router.gate}, while {name} routes by {gate}")
    else:
        problems += _gate_problems(name, gate, router, model.moe.num_experts)
    if router.forced_balance:
        problems.append("router.forced_balance replaces the gate's choice")
    if bias and name != "deepseek_v3":
        problems.append(
            f"router.balancing.bias has moved a selection bias, for which {name} has no place (deepseek_v3 has "
            "e_score_correction_bias)"
        )
    if model.moe.shared_expert_hidden_size is not None:
        width, shared = model.moe.expert_hidden_size, model.moe.shared_expert_hidden_size
        if name != "deepseek_v3":
            problems.append(f"model.moe.shared_expert_hidden_size is {shared}, while {name} has no shared expert")
        elif shared % width:
            problems.append(
                f"model.moe.shared_expert_hidden_size {shared} is no multiple of expert_hidden_size {width}"
            )
    dense = sorted(model.dense_layers)
    if dense and name in ("mixtral", "olmoe"):
        problems.append(f"model.dense_layers is {dense}, while all layers of {name} have experts")
    if name == "deepseek_v3" and dense != list(range(len(dense))):
        problems.append(f"model.dense_layers is {dense}, while those of deepseek_v3 are the first ones")
    if name == "olmoe" and model.head_dim not in (None, model.hidden_size // model.num_attention_heads):
        problems.append(f"model.head_dim is {model.head_dim}, while olmoe's is hidden_size / num_attention_heads")
    return problems


def _gate_problems(family: str, gate: str, router: RouterOptions, experts: int) -> list[str]:
    """Options of the right gate for which the family has no place."""
    options: Any = parse_options(gate_options(gate), router.options, f"gate {gate!r}")
    problems = []
    if gate == "sigmoid_topk":
        if options.num_groups == experts > 1:
            problems.append(
                f"router.options.num_groups is {experts}, a group for each expert, while those of {family} hold at"
                " least two"
            )
        return problems
    if family == "mixtral" and not options.sums_to_one:
        problems.append("router.options.renormalize is false, while mixtral's weights sum to one")
    if options.scaling != 1:
        problems.append(f"router.options.scaling is {options.scaling}, while {family} does not scale its weights")
    if options.groups_per_token < options.num_groups:
        problems.append(
            f"router.options.groups_per_token is {options.groups_per_token} of {options.num_groups}, while {family} has"
            " no groups of experts"
        )
    return problems
