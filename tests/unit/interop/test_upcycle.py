"""Models with experts that begin as dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.interop.upcycle import UpcycleOptions, plan
from moe_train.model.language_model import LanguageModel, build_language_model
from moe_train.model.options import InitOptions, ModelOptions, RopeScaling
from moe_train.parallel.groups import initialize
from moe_train.parallel.options import ParallelOptions
from moe_train.routing import available_gates, blank_gate
from moe_train.routing.options import BalancingOptions, BiasOptions, RouterOptions
from tests.distributed.harness.interop import forward

DENSE = ModelOptions(
    family="qwen3",
    num_layers=3,
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    vocab_size=101,
    ffn_hidden_size=48,
    init=InitOptions(std=0.2, scaled_residual=False),
)
BIAS = BalancingOptions(bias=BiasOptions(rate=0.001))
GATES: dict[str, RouterOptions] = {name: RouterOptions(name) for name in available_gates()} | {
    "forced_balance": RouterOptions("forced_balance", {"top_k": 4}),
    "hash": RouterOptions("hash", {"vocab_size": 101}),
    "quantile_balancing": RouterOptions("quantile_balancing", {"top_k": 4}),
    "softmax_topk": RouterOptions("softmax_topk", {"top_k": 4}, BIAS),
    "lpr": RouterOptions("lpr", {"top_k": 4, "latent_dim": 4}, BIAS),
    "dynamic_k": RouterOptions("dynamic_k", {"threshold": 0.5}),
    "noisy_topk": RouterOptions("noisy_topk", {"top_k": 4, "load": 0.0}, BIAS),
    "simbal": RouterOptions("simbal", {"top_k": 4}, BIAS),
    "gshard": RouterOptions("gshard", {"second": "all"}, BIAS),
    "sigmoid_topk": RouterOptions("sigmoid_topk", {"top_k": 4, "scaling": 2.5}, BIAS),
}
SHAPES = {
    "copies": UpcycleOptions(8),
    "slices": UpcycleOptions(8, granularity=2),
    "slices, shared, some layers": UpcycleOptions(8, granularity=4, shared_expert_hidden_size=16, layers=[0, 2]),
    "copies, shared, one layer": UpcycleOptions(3, shared_expert_hidden_size=7, layers=[1]),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    initialize(ParallelOptions())
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def ids(batch: int = 3, length: int = 20) -> Tensor:
    """[B, S], not fresh ones: rounding leaves differences up to half of the bound, now and then more."""
    return torch.randint(DENSE.vocab_size, (batch, length), generator=torch.Generator().manual_seed(7))


def built(model: ModelOptions, router: RouterOptions) -> LanguageModel:
    return build_language_model(model, router, sequence_length=32, seed=3).eval()


def upcycled(
    dense: LanguageModel, model: ModelOptions, router: RouterOptions, options: UpcycleOptions
) -> LanguageModel:
    """A model with the tensors of the plan and no others."""
    found, old = plan(model, router, options), dense.state_dict()
    new = {name: value for name, value in old.items() if name not in found.replaced()}
    for name, make in found.tensors():
        assert name not in new
        new[name] = make(old.__getitem__)
    result = built(found.model, found.router)
    result.load_state_dict({name: value for name, value in new.items() if value is not None})
    return result


def refusal(router: RouterOptions, options: UpcycleOptions) -> str | None:
    """What is said where a gate's declarations rule it out."""
    gate = blank_gate(router.gate, router.options, options.num_experts)
    if gate.weight_sum is None:
        return "combine weights whose sum differs"
    if options.granularity == 1:
        return None
    if gate.max_k is None or gate.max_k % options.granularity or not gate.expert_rows:
        return "needs a fixed number of experts per token that is a multiple of gran"
    return "does not choose the slices of a copy together" if gate.ties == "none" else None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", available_gates())
@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_the_output_is_the_dense_one(family: Any, gate: str, shape: str) -> None:
    """pitfalls row 42 (M PR3646, M a4417a5, OLMoE#9): also with layers that stay dense."""
    options = SHAPES[shape]
    scaling = RopeScaling("llama3", factor=8.0, original_length=16) if family == "llama3" else None
    model = replace(DENSE, family=family, rope_scaling=scaling)
    router = GATES.get(gate, RouterOptions(gate))
    if options.num_experts < 4 and "top_k" in router.options:
        router = replace(router, options=router.options | {"top_k": 2})
    if (why := refusal(router, options)) is not None:
        with pytest.raises(ValueError, match=why):
            plan(model, router, options)
        return
    dense = built(model, RouterOptions())
    ids_BS = ids()
    want = forward(dense, ids_BS)
    got = forward(upcycled(dense, model, router, options), ids_BS)
    assert want.abs().max() > 1
    assert (got - want).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ({"top_k": 2, "scaling": 2.5}, UpcycleOptions(8)),
        ({"top_k": 5, "scaling": 2.5}, UpcycleOptions(10, granularity=5)),
        ({"top_k": 5, "scaling": 1.0}, UpcycleOptions(10, granularity=5, shared_expert_hidden_size=5)),
    ],
    ids=["copies x 0.4", "slices x 2", "slices x 5"],
)
def test_bfloat16_is_not_rounded_again(router: dict[str, Any], options: UpcycleOptions) -> None:
    """Tensors are kept in their types and added up in float32 (OLMoE#9: the output is the dense one's)."""
    model = replace(DENSE, ffn_hidden_size=40 + (options.shared_expert_hidden_size or 0))
    dense = built(model, RouterOptions())
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(parameter.bfloat16())
    old = {name: value.bfloat16() for name, value in dense.state_dict().items() if value is not None}
    found = plan(model, RouterOptions("sigmoid_topk", router), options)
    new = {name: value for name, value in old.items() if name not in found.replaced()}
    for name, make in found.tensors():
        new[name] = make(old.__getitem__).to(found.dtype(name, torch.bfloat16))
    kept = {name.rpartition(".mlp.")[2] for name, value in new.items() if value.dtype == torch.float32}
    assert kept == (set() if found.factor == 2 else {"experts.weight2"})
    result = built(found.model, found.router)
    result.load_state_dict(new)
    ids_BS = ids()
    want = forward(dense, ids_BS)
    assert want.abs().max() > 1
    assert (forward(result, ids_BS) - want).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("gate", "own", "want"), [("hash", "table", torch.int64), ("quantile_balancing", "beta", torch.float32)]
)
def test_buffers_of_a_gate_keep_their_type(gate: str, own: str, want: torch.dtype) -> None:
    found, name = plan(DENSE, GATES[gate], SHAPES["copies"]), f"decoder.layers.0.mlp.router.gate.{own}"
    assert found.dtype(name, torch.bfloat16) == want == dict(found.tensors())[name]({}.__getitem__).dtype


@pytest.mark.parametrize("options", [{"prototypes": "frozen"}, {"prototypes": "ema", "similarity": "kl"}], ids=str)
def test_state_of_a_gate_keeps_its_type(options: dict[str, Any]) -> None:
    """Prototypes that a rule moves are float32 beside 16-bit weights, and those of one copy are alike."""
    router = RouterOptions("lpr", {"top_k": 4, "latent_dim": 4, **options})
    dense = built(DENSE, RouterOptions())
    found, old = plan(DENSE, router, SHAPES["slices"]), dense.state_dict()
    kept = {}
    for name, make in found.tensors():
        if found.dtype(name, torch.bfloat16) == torch.float32:
            kept[name.rpartition("router.gate.")[2]] = make(old.__getitem__)
    own = {"prototypes"} | ({"prototype_logvar", "prototype_mass"} if "similarity" in options else set())
    assert kept.keys() == own
    assert all(torch.equal(rows_E[::2], rows_E[1::2]) for rows_E in kept.values())
    assert not torch.equal(kept["prototypes"][0], kept["prototypes"][2])
    ids_BS = torch.randint(101, (3, 20))
    got = forward(upcycled(dense, DENSE, router, SHAPES["slices"]), ids_BS)
    assert (got - forward(dense, ids_BS)).abs().max() <= 1e-5


def test_what_the_model_becomes() -> None:
    found = plan(DENSE, GATES["softmax_topk"], SHAPES["slices, shared, some layers"])
    assert found.model.family == "qwen3_moe" and found.model.dense_layers == [1]
    assert found.model.ffn_hidden_size == 48
    assert found.model.moe.expert_hidden_size == 8 and found.model.moe.shared_expert_hidden_size == 16
    every = plan(replace(DENSE, family="llama3"), GATES["lpr"], SHAPES["copies"])
    assert every.model.family == "mixtral" and every.model.dense_layers == []
    assert every.model.ffn_hidden_size is None and every.model.moe.expert_hidden_size == 48


def test_noise_makes_experts_differ() -> None:
    dense = built(DENSE, RouterOptions())
    router, options = GATES["softmax_topk"], UpcycleOptions(4, noise=0.1)
    model = upcycled(dense, DENSE, router, options)
    weight_EFH = model.decoder.layers[0].mlp.experts.weight1.detach()
    assert torch.equal(weight_EFH, upcycled(dense, DENSE, router, options).decoder.layers[0].mlp.experts.weight1)
    original = dense.decoder.layers[0].mlp.weight1.detach()
    noise_EFH = (weight_EFH - original) / original.std()
    assert noise_EFH.std() == pytest.approx(0.1, rel=0.1)
    assert abs(torch.corrcoef(noise_EFH.flatten(1))[0, 1]) < 0.1
    assert (forward(model, ids(2, 9)) - forward(dense, ids(2, 9))).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("change", "router", "message"),
    [
        ({"granularity": 5}, {}, "48 inner units are left .* cut into 5 equal slices"),
        ({"shared_expert_hidden_size": 48}, {}, "0 inner units are left"),
        ({"num_experts": 0}, {}, "at least 1 expert, not 0"),
        ({"granularity": -1}, {}, "granularity is a number of slices, at least 1, not -1"),
        ({"seed": 2**63}, {}, "seed must fit into 64 bits"),
        ({"gate_std": 1e300}, {}, r"gate_std 1e\+300 is too large"),
        ({"num_experts": 6, "granularity": 4}, {}, "6 experts cannot hold whole sets of 4 slices"),
        ({"granularity": 4}, {"top_k": 2}, "a multiple of granularity 4"),
        ({"layers": [0, 3]}, {}, r"layers must name some of 0 to 2, not \[3\]"),
        ({"layers": []}, {}, "not none"),
        ({}, {"top_k": 4, "renormalize": False}, "sum differs from token to token"),
        ({"num_experts": 2}, {"top_k": 4}, "there are only 2 experts"),
        ({"noise": float("nan")}, {}, "noise is a standard deviation: .* not nan"),
        ({"noise": -1.0}, {}, "noise is a standard deviation: .* at least 0, not -1.0"),
        ({"gate_std": -3.0}, {}, "gate_std is a standard deviation: .* not -3.0"),
        ({"gate_std": float("inf")}, {}, "gate_std is a standard deviation: a finite number .* not inf"),
    ],
)
def test_what_cannot_keep_the_output(change: dict[str, Any], router: dict[str, Any], message: str) -> None:
    options = RouterOptions("softmax_topk", {"top_k": 4} | router)
    with pytest.raises(ValueError, match=message):
        plan(DENSE, options, replace(UpcycleOptions(8), **change))


def test_forced_experts() -> None:
    """Whole copies may be taken by turn, slices not: the turn goes by single experts."""
    router = replace(GATES["softmax_topk"], forced_balance=True)
    dense = built(DENSE, RouterOptions())
    ids_BS = torch.randint(101, (3, 20))
    got = forward(upcycled(dense, DENSE, router, SHAPES["copies"]), ids_BS)
    assert (got - forward(dense, ids_BS)).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="router.forced_balance takes experts by turn, not the 2 slices"):
        plan(DENSE, router, SHAPES["slices"])


@pytest.mark.parametrize("which", ["weight1", "weight2"])
def test_noise_that_no_weight_can_hold(which: str) -> None:
    old = built(DENSE, RouterOptions()).state_dict()
    found = plan(DENSE, GATES["softmax_topk"], UpcycleOptions(4, noise=1e300))
    make = dict(found.tensors())[f"decoder.layers.0.mlp.experts.{which}"]
    with pytest.raises(ValueError, match=r"noise 1e\+300 is too large: torch.float32"):
        make(old.__getitem__)


def test_a_model_with_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="only a dense model can be upcycled"):
        plan(ModelOptions(), RouterOptions(), UpcycleOptions())
