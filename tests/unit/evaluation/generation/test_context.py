"""With a cache: the same logits as without, for every family and every gate."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from moe_train.evaluation.generation.context import CachedContext, WholeContext
from moe_train.evaluation.generation.support import check_generates
from moe_train.evaluation.trace import read
from moe_train.model.language_model import LanguageModel
from moe_train.parallel.groups import Groups
from moe_train.routing import available_gates, gate_class
from moe_train.routing.options import BalancingOptions, BiasOptions, RouterOptions
from tests.unit.evaluation.generation.conftest import BASE, MODELS, build

LENGTHS, STEPS = (9, 1, 4, 13), 12
GATES = {name: RouterOptions(name) for name in available_gates()}
GATES |= {
    f"{name}_bias": RouterOptions(name, balancing=BalancingOptions(bias=BiasOptions(rate=0.1)))
    for name in available_gates()
    if gate_class(name).takes_bias
}
GATES["dynamic_k_bounded"] = RouterOptions("dynamic_k", {"threshold": 0.5, "max_k": 3})
GATES["softmax_topk_raw"] = RouterOptions("softmax_topk", {"top_k": 3, "renormalize": False})
GATES["forced"] = RouterOptions(forced_balance=True)


def compare(model: LanguageModel, name: str, steps: int = STEPS, lengths: Sequence[int] = LENGTHS) -> None:
    """Greedy steps of both contexts side by side; one sequence ends on the way.

    The prompts follow from the name: among fresh ones each time, some would have a selection of experts so near to a
    tie that rounding decides it.
    """
    draw = random.Random(name)
    vocab = model.output_layer.vocab_size
    prompts = [[draw.randrange(vocab) for _ in range(length)] for length in lengths]
    samples = [draw.randrange(1000) for _ in prompts]
    cached = CachedContext(model, prompts, samples, max(lengths) + steps)
    whole = WholeContext(model, prompts, samples)
    for step in range(steps):
        going = [row for row in range(len(prompts)) if row != 2 or step < 4]
        got, want = (context.logits()[going] for context in (cached, whole))
        assert got.shape == (len(going), vocab)
        assert (got - want).abs().max() < 1e-5, f"step {step}"
        best = want.topk(2).values
        clear = best[:, 0] - best[:, 1] > 1e-4
        assert torch.equal(got.argmax(-1)[clear], want.argmax(-1)[clear])
        chosen = dict(zip(going, want.argmax(-1).tolist(), strict=True))
        next_ids = [chosen.get(row) if row != 2 or step < 3 else None for row in range(len(prompts))]
        for context in (cached, whole):
            context.append(next_ids)


@pytest.mark.parametrize("family", MODELS)
def test_every_family(groups: Groups, family: str) -> None:
    compare(build(MODELS[family]), family)


@pytest.mark.parametrize("name", GATES)
def test_every_gate(groups: Groups, name: str) -> None:
    """Each registered gate that may generate at all; one that may not must say so."""
    router = GATES[name]
    model = build(BASE, router)
    try:
        check_generates(model)
    except ValueError:
        gate = gate_class(router.gate)
        assert not gate.causal or gate.pool != "token"
        return
    compare(model, name)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_rows_are_those_of_each_sequence_by_itself(groups: Groups, name: str) -> None:
    """Neither padding nor neighbours change the logits of a sequence."""
    model = build(MODELS[name])
    draw = random.Random(name)
    prompts = [[draw.randrange(100) for _ in range(length)] for length in LENGTHS]
    together = CachedContext(model, prompts, [0, 1, 2, 3], 40)
    rows = [CachedContext(model, [prompt], [number], 40) for number, prompt in enumerate(prompts)]
    for _ in range(3):
        got_BV = together.logits()
        torch.testing.assert_close(got_BV, torch.cat([row.logits() for row in rows]), rtol=0, atol=1e-5)
        tokens = got_BV.argmax(-1).tolist()
        together.append(tokens)
        for row, token in zip(rows, tokens, strict=True):
            row.append([token])


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_they_are_the_logits_of_the_whole_text(groups: Groups, name: str) -> None:
    """As the training's forward pass computes them, at each position."""
    model = build(MODELS[name])
    ids_BS = torch.randint(0, 100, (2, 20), generator=torch.Generator().manual_seed(5))
    want_BSV, _ = read(model, ids_BS)
    context = CachedContext(model, ids_BS[:, :6].tolist(), [0, 1], 20)
    for position in range(6, 20):
        torch.testing.assert_close(context.logits(), want_BSV[:, position - 1], rtol=0, atol=1e-5)
        context.append(ids_BS[:, position].tolist())


def test_a_rank_without_prompts_has_padding(groups: Groups) -> None:
    model = build(BASE)
    for context in (CachedContext(model, [], [], 5), WholeContext(model, [], [])):
        for _ in range(6):
            assert context.logits().shape == (1, 100)
            context.append([])


def test_more_than_the_cache_holds(groups: Groups) -> None:
    context = CachedContext(build(BASE), [[1, 2, 3]], [0], 4)
    context.logits()
    context.append([5])
    context.logits()
    context.append([5])
    with pytest.raises(ValueError, match="5 tokens do not fit into a cache for 4"):
        context.logits()


def test_bfloat16(groups: Groups) -> None:
    """The cache has the type of the model; logits differ by rounding alone (which would also move experts)."""
    model = build(MODELS["llama3"]).bfloat16()
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    cached, whole = CachedContext(model, prompts, [0, 1], 12), WholeContext(model, prompts, [0, 1])
    for _ in range(4):
        got, want = cached.logits(), whole.logits()
        assert got.dtype == torch.bfloat16 and (got - want).abs().max() < 0.1 * want.abs().max()
        for context in (cached, whole):
            context.append([7, 8])
