"""Helpers of the routing tests, and the conformance cases: every registered gate with its defaults, and variants.

A new gate joins tests/unit/routing/test_conformance.py by registering; VARIANTS may add option sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_train.routing import BalancedGate, Routing, TokenBatch, available_gates, build_gate, gate_class
from moe_train.routing.options import BalancingOptions, BiasOptions, RouterOptions, SwitchLossOptions

HIDDEN, EXPERTS = 16, 8
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "sigmoid_topk": [
        {"top_k": 3, "renormalize": False},
        {"top_k": 3, "num_groups": 4, "groups_per_token": 2, "scaling": 2.5},
        {"num_groups": 8, "groups_per_token": 3},
    ],
    "softmax_topk": [{"top_k": 3, "renormalize": False}, {"top_k": 2, "softmax": "after"}],
    "lpr": [
        {"scope": "micro_batch", "prototype_init": "hypersphere"},
        {"scope": "global_batch", "top_k": 3, "latent_dim": 4},
    ],
    "dynamic_k": [{"max_k": 3}, {"threshold": 0.4, "min_k": 2}],
}


@dataclass(frozen=True)
class Case:
    """A gate and its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def scope(self) -> str:
        """Token set of the gate's own losses."""
        return getattr(build_gate(self.name, self.options, HIDDEN, EXPERTS).options, "scope", "sequence")

    @property
    def max_k(self) -> int | None:
        return build_gate(self.name, self.options, HIDDEN, EXPERTS).max_k

    def router(self, scope: str = "sequence", bias: float = 0.0, **other: Any) -> RouterOptions:
        """This gate with every balancing piece that it takes."""
        cls = gate_class(self.name)
        balancing = BalancingOptions(
            switch_loss=SwitchLossOptions(coefficient=0.3 if cls.takes_switch_loss else 0.0, scope=scope),
            z_loss=0.2,
            bias=BiasOptions(rate=bias if cls.takes_bias else 0.0),
        )
        return RouterOptions(gate=self.name, options=self.options, balancing=balancing, **other)

    def balanced(self, dtype: torch.dtype = torch.float64, seed: int = 0, **kwargs: Any) -> BalancedGate:
        """With weights large enough to make decisions clear."""
        torch.manual_seed(seed)
        gate = BalancedGate(self.router(**kwargs), HIDDEN, EXPERTS).to(dtype)
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        return gate


CASES = [Case(name, options) for name in available_gates() for options in [{}, *VARIANTS.get(name, [])]]


# Argument of a test -> the cases that it is for. A gate's own losses have one token set; forced balance needs a max_k.
CASES_FOR: dict[str, Callable[[Case], bool]] = {
    "case": lambda case: True,
    "sequence_case": lambda case: case.scope == "sequence",
    "not_micro_batch_case": lambda case: case.scope != "micro_batch",
    "not_global_batch_case": lambda case: case.scope != "global_batch",
    "token_pool_case": lambda case: gate_class(case.name).pool == "token",
    "bounded_case": lambda case: case.max_k is not None,
    "unbounded_case": lambda case: case.max_k is None,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument in CASES_FOR.keys() & set(metafunc.fixturenames):
        cases = [case for case in CASES if CASES_FOR[argument](case)]
        assert cases, f"no case for {argument}"
        metafunc.parametrize(argument, cases, ids=str)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _make_batch(lengths: Sequence[int], sequence_length: int, samples: Sequence[int] | None = None, **kwargs: Any):
    """Sequences with that many tokens each, then padding; token t = s * B + b."""
    size = len(lengths)
    position_SB = torch.arange(sequence_length)[:, None].expand(sequence_length, size)
    sample_SB = torch.tensor(samples if samples is not None else range(size)).expand(sequence_length, size)
    return TokenBatch(
        ids_T=torch.randint(0, 100, (sequence_length * size,)),
        sample_T=sample_SB.reshape(-1),
        position_T=position_SB.reshape(-1),
        padding_T=(position_SB >= torch.tensor(lengths)).reshape(-1),
        sequence_length=sequence_length,
        batch_size=size,
        **kwargs,
    )


@pytest.fixture
def make_batch() -> Callable[..., TokenBatch]:
    return _make_batch


def _step_loss(routings: Sequence[Routing]) -> Tensor:
    """The auxiliary loss of an optimizer step from those of its micro-batches, as LossTerm defines it."""
    total = torch.zeros((), dtype=torch.float64)
    for name in routings[0].losses:
        terms = [r.losses[name] for r in routings]
        assert len({(t.unit, t.coefficient) for t in terms}) == 1
        count = sum(int(t.count) for t in terms)
        total = total + terms[0].coefficient * sum(t.sum for t in terms) / count
    return total


@pytest.fixture
def step_loss() -> Callable[[Sequence[Routing]], Tensor]:
    return _step_loss
