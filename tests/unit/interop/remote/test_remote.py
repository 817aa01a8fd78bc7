"""Exports with a modelling file of their own: loaded by transformers, they compute what our model computes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from moe_train.evaluation.result import write_evaluation
from moe_train.interop.remote.bundle import bundle
from moe_train.model.families import evaluated_moe_layers
from moe_train.model.language_model import LanguageModel
from moe_train.routing import Gate, available_gates, register_gate
from moe_train.routing.options import RouterOptions
from moe_train.routing.registry import _GATES
from tests.distributed.harness.interop import forward
from tests.unit.interop.remote.models import (
    DENSE,
    FAMILIES,
    MODEL,
    ROUTERS,
    VOCAB,
    Exported,
    load,
)


def greedy(model: LanguageModel, ids_BS: Tensor, count: int) -> tuple[Tensor, float]:
    """Our own continuation without a cache, and the smallest lead of a chosen token."""
    lead = float("inf")
    for _ in range(count):
        last_BV = forward(model, ids_BS)[:, -1]
        best = last_BV.topk(2).values
        lead = min(lead, float((best[:, 0] - best[:, 1]).min()))
        ids_BS = torch.cat([ids_BS, last_BV.argmax(-1, keepdim=True)], dim=1)
    return ids_BS, lead


MODELS = [(name, gate) for name in FAMILIES for gate in available_gates()] + [(name, "softmax_topk") for name in DENSE]


@pytest.mark.parametrize(("family", "gate"), MODELS)
def test_logits_and_generation(exported: Exported, family: str, gate: str) -> None:
    """Every registered gate in every family, also from several files, tied, mixed, with padding on the left."""
    model = (FAMILIES | DENSE)[family]
    built, folder, report = exported(model, ROUTERS[gate])
    theirs = load(folder)
    ids_BS = torch.randint(1, VOCAB, (3, 20))
    want = forward(built, ids_BS)
    result = theirs(ids_BS, output_router_logits=True)
    assert (result.logits - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))
    assert len(result.router_logits) == len(evaluated_moe_layers(model))

    continued, lead = greedy(built, ids_BS, 5)
    generated = theirs.generate(ids_BS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, continued) or lead < 1e-4
    padding = torch.zeros(3, 4, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(ids_BS)], dim=1)
    padded = theirs(torch.cat([padding, ids_BS], dim=1), attention_mask=mask).logits[:, 4:]
    assert (padded - want).abs().max() <= 1e-4
    left_out = any("multi-token prediction is left out" in note for note in report.notes)
    assert left_out == bool(model.multi_token.layers)


def test_it_needs_torch_and_transformers_alone(exported: Exported, tmp_path: Path) -> None:
    built, folder, _ = exported(FAMILIES["qwen3_moe"], ROUTERS["lpr"])
    ids_BS = torch.randint(1, VOCAB, (2, 11))
    torch.save({"ids": ids_BS, "logits": forward(built, ids_BS)}, tmp_path / "want.pt")
    code = f"""
import sys
for name in ("moe_train", "deepspeed", "megatron", "pydantic", "pyarrow", "omegaconf"):
    sys.modules[name] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM
want = torch.load({str(tmp_path / "want.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True, dtype=torch.float32).eval()
with torch.no_grad():
    assert (model(want["ids"]).logits - want["logits"]).abs().max() < 1e-4
model.train()
loss = model(want["ids"], labels=want["ids"]).loss
loss.backward()
assert all(p.grad is not None for n, p in model.named_parameters() if "gate.encoder" in n)
model.save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True).eval()
with torch.no_grad():
    assert (again(want["ids"]).logits - want["logits"]).abs().max() < 1e-4
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_form_is_stock_where_a_class_does_it(exported: Exported, tmp_path: Path) -> None:
    router = RouterOptions("softmax_topk", {"top_k": 2})
    built, folder, report = exported(replace(MODEL), router, "auto")
    assert not list(folder.glob("*.py")) and "Qwen3MoeForCausalLM" in report.summary
    ids_BS = torch.randint(1, VOCAB, (2, 9))
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert (stock(ids_BS).logits - forward(built, ids_BS)).abs().max() < 1e-4
    card = (folder / "README.md").read_text()
    assert "trust_remote_code" not in card and "`Qwen3MoeForCausalLM`, which transformers ships" in card


def test_a_biased_gate_is_refused_by_stock_classes(exported: Exported) -> None:
    """pitfalls row 13 (FlagScale PR412, ms-swift#6793): no place for the bias is an error, or another form."""
    with pytest.raises(ValueError, match="selection bias, for which qwen3_moe has no place"):
        exported(MODEL, ROUTERS["softmax_topk"], "stock")


def test_the_card_has_what_the_run_measured(exported: Exported, tmp_path: Path) -> None:
    result = {"step": 7, "data": "held out", "loss": 3.25, "perplexity": 25.79, "layers": []}
    result["mean"] = {"gini": 0.125, "mean_k": 2.0}
    write_evaluation(tmp_path / "run/evaluation/other.json", result | {"step": 6, "loss": 9.0})
    write_evaluation(tmp_path / "run/evaluation/held_out.json", result)
    _, folder, report = exported(MODEL, ROUTERS["lpr"], "auto")
    card = (folder / "README.md").read_text()
    for part in ("On `held out`, step 7", "| 3.2500 |", "| 25.79 |", "gini, mean over layers | 0.125 |", "gate `lpr`"):
        assert part in card
    assert "router.gate is lpr, while qwen3_moe routes by softmax_topk" in card
    assert any("trust_remote_code=True" in note for note in report.notes)


@pytest.mark.parametrize("gate", available_gates())
def test_a_bundle_stands_alone(gate: str) -> None:
    source = bundle(gate)
    assert "moe_train." not in "\n".join(line for line in source.splitlines() if "import" in line)
    module: dict[str, Any] = {"__name__": "bundled"}
    sys.modules["bundled"] = type(sys)("bundled")
    try:
        sys.modules["bundled"].__dict__.update(module)
        exec(compile(source, "bundled", "exec"), sys.modules["bundled"].__dict__)
        built = sys.modules["bundled"].build_gate(gate, ROUTERS[gate].options, 16, 8)
        assert type(built).__module__ == "bundled"
    finally:
        del sys.modules["bundled"]


def test_a_gate_of_another_project_is_named() -> None:
    class Elsewhere(Gate):
        pass

    register_gate("elsewhere", object)(Elsewhere)
    try:
        with pytest.raises(ValueError, match="gate 'elsewhere' is defined in .*outside of moe_train.routing"):
            bundle("elsewhere")
    finally:
        del _GATES["elsewhere"]
