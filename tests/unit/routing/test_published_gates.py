"""The gates of the published families as transformers has them: the same experts and weights from the same numbers."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from moe_train.routing import build_gate

pytestmark = pytest.mark.usefixtures("fresh_seed")

HIDDEN, EXPERTS, K, TOKENS = 32, 16, 4, 400

SOFTMAX = [
    ("mixtral", "Mixtral", {}, {"softmax": "after"}),
    ("olmoe", "Olmoe", {"norm_topk_prob": False}, {"renormalize": False}),
    ("olmoe", "Olmoe", {"norm_topk_prob": True}, {"renormalize": True}),
    ("qwen3_moe", "Qwen3Moe", {"norm_topk_prob": False}, {"renormalize": False}),
    ("qwen3_moe", "Qwen3Moe", {"norm_topk_prob": True}, {"renormalize": True}),
]
SIGMOID = [
    ({"n_group": 1, "topk_group": 1}, {}),
    ({"n_group": 4, "topk_group": 2}, {"num_groups": 4, "groups_per_token": 2}),
    ({"n_group": 8, "topk_group": 3}, {"num_groups": 8, "groups_per_token": 3}),
    ({"n_group": 2, "topk_group": 2}, {"num_groups": 2, "groups_per_token": 2}),
]


GREEDY = [
    ({"topk_method": "greedy"}, {}),
    ({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, {"num_groups": 4, "groups_per_token": 2}),
    ({"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}, {"num_groups": 8, "groups_per_token": 3}),
    (
        {"topk_method": "group_limited_greedy", "n_group": 16, "topk_group": 5},
        {"num_groups": 16, "groups_per_token": 5},
    ),
]


def theirs(family: str, prefix: str, **options: Any) -> Any:
    """The router of a family with random weights."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(importlib.import_module(f"transformers.models.{family}"), f"{prefix}Config")
    experts = {
        "mixtral": "num_local_experts",
        "deepseek_v2": "n_routed_experts",
        "deepseek_v3": "n_routed_experts",
    }.get(family, "num_experts")
    config = config(hidden_size=HIDDEN, num_experts_per_tok=K, **{experts: EXPERTS}, **options)
    name = f"{prefix}TopkRouter" if prefix.startswith("Deepseek") else f"{prefix}TopKRouter"
    router = getattr(module, name)(config)
    torch.nn.init.normal_(router.weight, std=0.3)
    return router


def without_ties(ranked_TE, groups=1):
    """bool [T]: tokens of which neither two experts nor two groups tie (torch.topk decides those as it likes)."""
    pairs_TG = ranked_TE.unflatten(1, (groups, -1)).sort(dim=-1).values[..., -2:].sum(-1)
    gaps = [values.sort(dim=-1).values.diff(dim=-1) for values in (ranked_TE, pairs_TG)]
    return (torch.cat(gaps, dim=1) > 1e-6).all(1)


def compare(name, options, router, make_batch, bias_E=None, ranked=lambda logits_TE: logits_TE):
    gate = build_gate(name, {"top_k": K, **options}, HIDDEN, EXPERTS)
    gate.weight.data.copy_(router.weight.data)
    x_TH = torch.randn(TOKENS, HIDDEN)
    logits_TE, weights_TK, experts_TK = router(x_TH)
    clear_T = without_ties(ranked(logits_TE.detach()), options.get("num_groups", 1))
    assert int(clear_T.sum()) > 0.9 * TOKENS
    routing = gate(x_TH, make_batch([TOKENS], TOKENS), bias_E=bias_E)
    assert torch.equal(routing.logits_TE, logits_TE)
    weights_TE = torch.zeros(TOKENS, EXPERTS).scatter(1, experts_TK, weights_TK)
    assert torch.equal(routing.selected_TE[clear_T], (weights_TE > 0)[clear_T])
    torch.testing.assert_close(routing.weights_TE[clear_T], weights_TE[clear_T], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("family", "prefix", "published", "options"), SOFTMAX)
def test_softmax_topk_is_the_gate_of(family, prefix, published, options, make_batch):
    compare("softmax_topk", options, theirs(family, prefix, **published), make_batch)


@pytest.mark.parametrize(("groups", "options"), GREEDY)
@pytest.mark.parametrize("scaling", [1.0, 16.0])
def test_softmax_topk_is_the_gate_of_deepseek_v2(groups, options, scaling, make_batch):
    """Device-limited routing: the score of a group is its largest probability."""
    router = theirs("deepseek_v2", "DeepseekV2", routed_scaling_factor=scaling, **groups)
    compare("softmax_topk", {"renormalize": False, "scaling": scaling, **options}, router, make_batch)


@pytest.mark.parametrize(("groups", "options"), SIGMOID)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scaling", [1.0, 2.5])
def test_sigmoid_topk_is_the_gate_of_deepseek_v3(groups, options, renormalize, scaling, make_batch):
    """Pitfall 12 and 13: e_score_correction_bias is the selection bias, and is in no weight."""
    published = {"norm_topk_prob": renormalize, "routed_scaling_factor": scaling, **groups}
    router = theirs("deepseek_v3", "DeepseekV3", **published)
    bias_E = torch.randn(EXPERTS) * 0.1
    router.e_score_correction_bias.copy_(bias_E)
    options = {"renormalize": renormalize, "scaling": scaling, **options}
    compare("sigmoid_topk", options, router, make_batch, bias_E, lambda logits_TE: logits_TE.sigmoid() + bias_E)
