"""Helpers of the routing tests, and the conformance cases: every registered gate with its defaults, and variants.

A new gate joins test_conformance_*.py by registering; tests/gate_variants.py may add option sets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_train.routing import BalancedGate, Gate, Routing, TokenBatch, available_gates, build_gate
from moe_train.routing.options import (
    BalancingOptions,
    BiasOptions,
    ImportanceLossOptions,
    RouterOptions,
    SwitchLossOptions,
)
from moe_train.routing.registry import own_scope
from tests.gate_variants import VARIANTS

HIDDEN, EXPERTS = 16, 8


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
        return own_scope(self.gate) or "sequence"

    @functools.cached_property
    def gate(self) -> Gate:
        """To be asked what it declares; made once."""
        return build_gate(self.name, self.options, HIDDEN, EXPERTS)

    def router(self, scope: str = "sequence", bias: float = 0.0, **other: Any) -> RouterOptions:
        """This gate with every balancing piece that it takes."""
        gate = self.gate
        balancing = BalancingOptions(
            switch_loss=SwitchLossOptions(coefficient=0.3 if gate.takes_switch_loss else 0.0, scope=scope),
            z_loss=0.2 if gate.takes_z_loss else 0.0,
            bias=BiasOptions(rate=bias if gate.takes_bias else 0.0),
            importance_loss=ImportanceLossOptions(
                coefficient=0.25 if gate.reads_hidden else 0.0,
                scope=scope,
                of="probabilities" if gate.takes_switch_loss else "weights",
            ),
        )
        return RouterOptions(gate=self.name, options=self.options, balancing=balancing, **other)

    def balanced(
        self, dtype: torch.dtype = torch.float64, seed: int = 0, training: bool = True, **kwargs: Any
    ) -> BalancedGate:
        """With weights large enough to make decisions clear; in training or evaluation mode."""
        router = self.router(**kwargs)
        torch.manual_seed(seed)
        gate = BalancedGate(router, HIDDEN, EXPERTS).to(dtype)
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        return gate.train(training)


CASES = [Case(name, options) for name in available_gates() for options in [{}, *VARIANTS.get(name, [])]]


# Argument of a test -> the cases that it is for. A gate's own losses have one token set; forced balance needs a max_k.
CASES_FOR: dict[str, Callable[[Case], bool]] = {
    "case": lambda case: True,
    "sequence_case": lambda case: case.scope == "sequence" and case.gate.pool != "micro_batch",
    "not_micro_batch_case": lambda case: "micro_batch" not in (case.scope, case.gate.pool),
    "not_global_batch_case": lambda case: case.scope != "global_batch",
    "token_pool_case": lambda case: case.gate.pool == "token",
    "linear_case": lambda case: "weight" in dict(case.gate.named_parameters()),
    "learned_case": lambda case: bool(list(case.gate.parameters())),
    "bounded_case": lambda case: case.gate.max_k is not None,
    "learned_bounded_case": lambda case: case.gate.max_k is not None and bool(list(case.gate.parameters())),
    "biased_case": lambda case: case.gate.takes_bias,
    "unbounded_case": lambda case: case.gate.max_k is None,
}


@functools.cache
def cases_for(argument: str) -> list[Case]:
    return [case for case in CASES if CASES_FOR[argument](case)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument in CASES_FOR.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(argument, cases_for(argument), ids=str)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fresh_seed() -> int:
    """Another seed for torch's generator in every run; shown where the test fails."""
    seed = torch.seed()
    print(f"torch.manual_seed({seed})")
    return seed


def _make_batch(
    lengths: Sequence[int], sequence_length: int, samples: Sequence[int] | None = None, **kwargs: Any
) -> TokenBatch:
    """Sequences with that many tokens each, then padding; token t = s * B + b."""
    size = len(lengths)
    position_SB = torch.arange(sequence_length)[:, None].expand(sequence_length, size)
    sample_SB = torch.tensor(samples if samples is not None else range(size)).expand(sequence_length, size)
    return TokenBatch(
        ids_T=((sample_SB * 37 + position_SB * 11) % 100).reshape(-1),
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
