"""The README.md of an export: what loads it, and what its run measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_train.model.families import family_of
from moe_train.model.options import ModelOptions
from moe_train.routing.options import RouterOptions

_BALANCE = ("gini", "gini_floor", "min_max", "cv", "entropy", "max_violation", "dead_experts", "mean_k")


def model_card(
    name: str,
    model: ModelOptions,
    router: RouterOptions,
    *,
    hub_class: str,
    custom: list[str] | None,
    step: int,
    evaluation: dict[str, Any] | None,
) -> str:
    """Markdown. ``custom``: why it has a modelling file of its own; None where a class of transformers holds it.
    ``evaluation``: the newest result of the run for this step, as `evaluate` writes it."""
    return "\n".join(_lines(name, model, router, hub_class, custom, step, evaluation)) + "\n"


def _lines(
    name: str,
    model: ModelOptions,
    router: RouterOptions,
    hub_class: str,
    custom: list[str] | None,
    step: int,
    evaluation: dict[str, Any] | None,
) -> Iterator[str]:
    yield from ("---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", f"# {name}", "")
    gate = f" Experts are chosen by the gate `{router.gate}`." if family_of(model).experts else ""
    yield f"A language model of the family `{model.family}`, exported by moe_train after step {step:,}.{gate}"
    yield from ("", "## Loading", "")
    remote = "" if custom is None else ", trust_remote_code=True"
    yield from (
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER"{remote})',
        "```",
        "",
    )
    if custom is None:
        yield f"Its class is `{hub_class}`, which transformers ships."
    else:
        yield "No class that transformers ships computes this model:"
        yield from ("", *(f"- {reason}" for reason in custom), "")
        yield f"`{hub_class}` in `modeling_moe_train.py` beside the weights does; it needs torch and transformers"
        yield "alone, and the file `routing_…` holds the gate. Read both before you trust them."
    yield from ("", "## Measured", "")
    if evaluation is None:
        yield "The run's folder has no evaluation of this step."
        return
    yield f"On `{evaluation['data']}`, step {evaluation['step']:,}:"
    yield from ("", "| | |", "|---|---|")
    yield f"| loss, nats per token | {evaluation['loss']:.4f} |"
    yield f"| perplexity | {evaluation['perplexity']:.2f} |"
    for key in _BALANCE:
        if key in evaluation["mean"]:
            yield f"| {key.replace('_', ' ')}, mean over layers | {evaluation['mean'][key]:.4g} |"
