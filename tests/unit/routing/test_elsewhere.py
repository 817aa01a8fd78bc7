"""The Python code of the pages on use without this trainer, run as it stands, and what it builds against references."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.routing import available_gates
from moe_train.routing.options import RouterOptions

DOCS = Path(__file__).resolve().parents[3] / "docs" / "routing"


def blocks(page: str) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found
    return found


def run(page: str, count: int | None = None) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks(page)[:count]):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


def without_training(name: str) -> dict[str, Any]:
    """The definitions of a page, without the loops that train."""
    names: dict[str, Any] = {}
    for block in blocks(name):
        if "optimizer" not in block:
            exec(block, names)
    exec(re.search(r"^def auxiliary_loss.*?(?=^\S)", blocks(name)[1], re.MULTILINE | re.DOTALL).group(), names)
    return names


def test_the_page_runs_and_its_loops_train():
    names = run("elsewhere.md")
    bias_E = names["plain"].gate.bias_E
    assert bool(bias_E.any()) and float(bias_E.abs().max()) < 0.01
    for block in (names["plain"], *names["blocks"]):
        assert all(parameter.grad is not None for parameter in block.gate.parameters())
        assert any(bool(parameter.grad.any()) for parameter in block.gate.parameters())
    assert len(names["blocks"]) == 2 and [block.gate.layer for block in names["blocks"]] == [0, 1]


def test_the_example_of_the_index_runs():
    names = run("index.md", count=1)
    assert float(names["auxiliary"].detach()) > 0 and names["routing"].weights_TE.shape == (512, 32)


@pytest.mark.parametrize("gate", available_gates())
def test_the_block_is_the_weighted_sum_of_experts(gate):
    """Slow reference: every token through every expert, times its weight; tokens in the order [B, S]."""
    names = without_training("elsewhere.md")
    torch.manual_seed(0)
    experts = names["Experts"](torch.nn.Linear(12, 12) for _ in range(8))
    block = names["RoutedBlock"](RouterOptions(gate), 12, 8, experts)
    with torch.no_grad():
        for parameter in block.gate.parameters():
            parameter.normal_(std=0.5)
    real_BS = torch.tensor([[1] * 5, [0, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    x_BSH = torch.randn(3, 5, 12)
    got_BSH = block(x_BSH, names["token_batch"](torch.randint(50, (3, 5)), real_BS))
    routing = block.routing
    assert int(routing.sums["tokens"]) == int(real_BS.sum())
    for b in range(3):
        for s in range(5):
            t = s * 3 + b
            x_H = x_BSH[b, s]
            if routing.expert_input_shift_TH is not None:
                x_H = x_H + routing.expert_input_shift_TH[t]
            want_H = sum(routing.weights_TE[t, e] * expert(x_H) for e, expert in enumerate(experts))
            torch.testing.assert_close(got_BSH[b, s], want_H * real_BS[b, s], rtol=1e-4, atol=1e-5)


def qwen3(**options):
    import transformers

    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            moe_intermediate_size=16,
            num_hidden_layers=3,
            mlp_only_layers=[1],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=8,
            num_experts_per_tok=2,
            **options,
        )
    )


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_the_same_router_gives_transformers_its_own_logits(implementation):
    """A pretrained router moved into our gate: nothing changes, with padding on the left and in generation."""
    use_gate = without_training("elsewhere.md")["use_gate"]
    model = qwen3(norm_topk_prob=True, experts_implementation=implementation).eval()
    for layer in (0, 2):
        torch.nn.init.normal_(model.model.layers[layer].mlp.gate.weight)
    ids_BS = torch.randint(1, 100, (3, 9))
    real_BS = torch.ones_like(ids_BS)
    real_BS[1, :4] = 0
    with torch.no_grad():
        want = model(input_ids=ids_BS, attention_mask=real_BS).logits
        generated = model.generate(ids_BS, attention_mask=real_BS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        weights = [model.model.layers[layer].mlp.gate.weight for layer in (0, 2)]
        routed = use_gate(model, RouterOptions("softmax_topk", {"top_k": 2}))
        assert len(routed) == 2
        for block, weight in zip(routed, weights, strict=True):
            block.gate.gate.weight.copy_(weight)
        got = model(input_ids=ids_BS, attention_mask=real_BS).logits
        torch.testing.assert_close(got[real_BS.bool()], want[real_BS.bool()], rtol=1e-4, atol=1e-5)
        again = model.generate(ids_BS, attention_mask=real_BS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, again)


@pytest.mark.parametrize(
    "router",
    [RouterOptions("uniform_random"), RouterOptions("forced_balance"), RouterOptions(forced_balance=True)],
    ids=["by lot", "by turn", "forced"],
)
def test_a_cache_changes_no_choice_by_position(router):
    """Each new token has its place in the text, not position 0."""
    use_gate = without_training("elsewhere.md")["use_gate"]
    model = qwen3(experts_implementation="eager").eval()
    (first, _) = use_gate(model, router)
    ids_BS = torch.randint(1, 100, (2, 5))
    chosen = []
    with torch.no_grad():
        whole = model(input_ids=ids_BS, use_cache=False).logits
        chosen.append(first.routing.selected_TE.view(5, 2, 8)[-2:])
        cache = model(input_ids=ids_BS[:, :3], use_cache=True).past_key_values
        last = model(input_ids=ids_BS[:, 3:], past_key_values=cache).logits
        chosen.append(first.routing.selected_TE.view(2, 2, 8))
    assert torch.equal(*chosen)
    torch.testing.assert_close(last, whole[:, 3:], rtol=1e-4, atol=1e-5)


def forget_memory():
    """Fills memory that is free with NaN, so that what is never written shows (row 16)."""
    junk = [torch.full((size,), float("nan")) for size in (64, 512, 1024, 4096, 16384, 65536) for _ in range(4)]
    del junk


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("gate", ["relu", "gshard"])
def test_unused_slots_change_nothing_in_transformers(gate, implementation):
    """Row 16 (transformers PR48205, pytorch#193633): grouped_mm does not write the rows of slots without an expert."""
    use_gate = without_training("elsewhere.md")["use_gate"]
    ids_BS = torch.randint(1, 100, (2, 8), generator=torch.Generator().manual_seed(1))
    real_BS = torch.ones_like(ids_BS)
    real_BS[1, 5:] = 0
    logits = []
    for chosen in ("eager", implementation):
        model = qwen3(experts_implementation=chosen)
        use_gate(model, RouterOptions(gate))
        forget_memory()
        out = model(input_ids=ids_BS, attention_mask=real_BS).logits[real_BS.bool()]
        logits.append(out.detach())
        forget_memory()
        out.square().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", available_gates())
def test_every_gate_trains_in_transformers(gate):
    names = without_training("elsewhere.md")
    model = qwen3()
    routed = names["use_gate"](model, RouterOptions(gate))
    ids_BS = torch.randint(1, 100, (2, 8))
    forget_memory()
    loss = model(input_ids=ids_BS, labels=ids_BS).loss + names["auxiliary_loss"](routed)
    loss.backward()
    assert bool(torch.isfinite(loss))
    for block in routed:
        learned = list(block.gate.parameters())
        assert not learned or any(p.grad is not None and bool(p.grad.any()) for p in learned)
        block.gate.after_step(block.routing.sums)
