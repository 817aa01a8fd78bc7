"""The two forms that an export can have: a class that transformers ships, or a modelling file of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moe_train.interop.config_export import to_hub, type_name
from moe_train.interop.layout import Layout, lay_out
from moe_train.interop.remote.files import remote_config, write_code
from moe_train.interop.remote.table import remote_table
from moe_train.interop.stock import stock_class_problems
from moe_train.model.families import family_of
from moe_train.model.options import ModelOptions, MultiTokenOptions
from moe_train.routing.options import RouterOptions

Form = Literal["auto", "stock", "custom"]


@dataclass(frozen=True)
class HubForm:
    content: dict[str, Any]
    """Of config.json."""
    layout: Layout
    custom: list[str] | None
    """Why it has a modelling file of its own; None for a class of transformers."""
    gate: str
    left_out: str | None = None
    """Beginning of the names of ours that this form has no place for."""

    def write_code(self, folder: Path) -> None:
        if self.custom is not None:
            write_code(self.gate, folder)


def hub_form(model: ModelOptions, router: RouterOptions, form: Form, *, max_length: int, dtype: torch.dtype) -> HubForm:
    """``auto``: a class of transformers where one computes the same, else a modelling file.

    Errors: ValueError where ``stock`` is asked for and no class of transformers can hold the model, and where it drops
    tokens in evaluation or its experts are forced, which neither form can.
    """
    if family_of(model).experts and router.forced_balance:
        raise ValueError(
            "router.forced_balance is true: this model takes its experts by turn, and an exported one those that its "
            "gate chooses, so that it would compute something else. Only models with forced_balance: false can be "
            "exported; the gate forced_balance, which does the same, can be, too"
        )
    if family_of(model).experts and router.capacity.evaluation_factor is not None:
        raise ValueError(
            f"router.capacity.evaluation_factor is {router.capacity.evaluation_factor}: this model drops tokens in "
            "evaluation, and an exported model has no capacity, so that it would compute something else. Only models "
            "with evaluation_factor: null can be exported"
        )
    problems = stock_class_problems(model, router)
    if form == "stock" or (form == "auto" and not problems):
        content = to_hub(model, router, max_length=max_length, dtype=dtype)
        return HubForm(content, lay_out(model, router), None, router.gate)
    # Which transformers leaves out as well.
    plain = dataclasses.replace(model, multi_token=MultiTokenOptions())
    layout = lay_out(plain, router, remote_table(plain, router))
    content = remote_config(plain, router, max_length=max_length, dtype=type_name(dtype))
    reasons = problems or ["it was asked for: a class of transformers would do as well"]
    return HubForm(content, layout, reasons, router.gate, left_out="mtp." if model.multi_token.layers else None)
