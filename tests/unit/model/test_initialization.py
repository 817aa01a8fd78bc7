"""Initial weights are a function of (seed, name, global expert index) only (invariant 9)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_train.model.experts.module import Experts
from moe_train.model.feed_forward import FeedForward
from moe_train.model.initialization import initialize_weights
from moe_train.model.options import InitOptions, ModelOptions
from moe_train.routing.gates.lpr import LatentPrototypeGate

OPTIONS = ModelOptions(num_layers=8, init=InitOptions(std=0.05))


class Model(nn.Module):
    """Names as in the real model; ``ranks`` is the size of expert parallelism."""

    def __init__(self, rank: int = 0, ranks: int = 1, reverse: bool = False) -> None:
        super().__init__()
        count = 8 // ranks
        parts = {
            "self_attention": nn.ModuleDict({"linear_proj": nn.Linear(64, 64)}),
            "norm": nn.LayerNorm(64),
            "experts": Experts(count, rank * count, 64, 32, "grouped"),
            "gate": LatentPrototypeGate(64, 8),
        }
        for name in reversed(parts) if reverse else parts:
            self.add_module(name, parts[name])


def weights(model: nn.Module, seed: int = 7, options: ModelOptions = OPTIONS) -> dict[str, Tensor]:
    initialize_weights(model, options, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_experts_depend_on_their_global_index() -> None:
    whole = weights(Model())
    for ranks in (2, 4, 8):
        parts = [weights(Model(rank, ranks)) for rank in range(ranks)]
        for name, weight in whole.items():
            if name.startswith("experts."):
                assert torch.equal(torch.cat([part[name] for part in parts]), weight)
            else:
                assert all(torch.equal(part[name], weight) for part in parts)
    experts = whole["experts.weight1"].flatten(1)
    assert torch.pdist(experts).min() > 1, "two experts are alike"


def test_order_and_global_generator_do_not_matter() -> None:
    first = weights(Model())
    torch.manual_seed(123)
    second = weights(Model(reverse=True))
    assert all(torch.equal(second[name], weight) for name, weight in first.items())


def test_seed_and_name_do_matter() -> None:
    first, other = weights(Model()), weights(Model(), seed=8)
    assert not torch.equal(first["experts.weight1"], other["experts.weight1"])
    assert not torch.equal(first["gate.prototypes"], other["gate.prototypes"])
    flat = first["experts.weight1"].flatten(), first["self_attention.linear_proj.weight"].flatten()
    assert not torch.equal(flat[0][:100], flat[1][:100])


def test_scale() -> None:
    values = weights(Model())
    residual = 0.05 / (2 * 8) ** 0.5
    assert abs(float(values["experts.weight1"].std()) / 0.05 - 1) < 0.05
    assert abs(float(values["experts.weight2"].std()) / residual - 1) < 0.05
    assert abs(float(values["self_attention.linear_proj.weight"].std()) / residual - 1) < 0.05
    unscaled = ModelOptions(num_layers=8, init=InitOptions(std=0.05, scaled_residual=False))
    assert abs(float(weights(Model(), options=unscaled)["experts.weight2"].std()) / 0.05 - 1) < 0.05


def test_norms_biases_and_what_a_gate_chooses_itself() -> None:
    values = weights(Model())
    assert (values["norm.weight"] == 1).all() and not values["norm.bias"].any()
    assert not values["gate.encoder.bias"].any() and (values["gate.norm.weight"] == 1).all()
    assert abs(float(values["gate.prototypes"].std()) - 1) < 0.3
    assert abs(float(values["gate.encoder.weight"].std()) / 0.05 - 1) < 0.1


def test_matrices_of_dense_layers_and_multi_token_prediction() -> None:
    """What writes into the residual stream, by the names of the real model, and nothing else, is scaled."""
    names = {
        "decoder.layers.0.mlp": FeedForward(64, 96),
        "decoder.layers.1.mlp.shared_experts": FeedForward(64, 96),
        "mtp": nn.ModuleDict({"linear_proj": nn.Linear(128, 64, bias=False)}),
        "mtp.layer.self_attention": nn.ModuleDict({"linear_proj": nn.Linear(64, 64, bias=False)}),
        "mtp.layer.mlp.experts": Experts(4, 0, 64, 32, "grouped"),
    }
    model = nn.Module()
    for name, module in names.items():
        *path, last = name.split(".")
        owner = model
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.add_module(last, module)
    scaled = {
        "decoder.layers.0.mlp.weight2",
        "decoder.layers.1.mlp.shared_experts.weight2",
        "mtp.layer.self_attention.linear_proj.weight",
        "mtp.layer.mlp.experts.weight2",
    }
    for name, weight in weights(model).items():
        want = 0.05 / 4 if name in scaled else 0.05
        assert abs(float(weight.std()) / want - 1) < 0.06, name
