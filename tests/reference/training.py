"""A plain training loop over global batches: one forward and backward pass per optimizer step, one process.

Suffixes: E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.data import Tokens
from tests.reference.geometry import Geometry, Router
from tests.reference.losses import auxiliary_losses, token_sets
from tests.reference.model import Weights, forward


@dataclass(frozen=True)
class Optimizer:
    name: str = "sgd"
    lr: float = 1.0
    clip: float = 0.0
    """Largest global gradient norm; 0 for none."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay: Callable[[str, Tensor], bool] = lambda name, w: w.dim() < 2 or name.endswith("prototypes")


@dataclass(frozen=True)
class Step:
    """What is known after one optimizer step."""

    loss: float
    """Language loss per target token."""
    gradient_norm: float
    """Before clipping."""
    weights: Weights
    auxiliary: list[dict[str, float]]
    """Per layer, without coefficients."""
    load_LE: Tensor
    kept_LE: Tensor
    biases_LE: Tensor
    margin: float
    """Smallest distance from another selection, over all layers and tokens."""


def run(
    geometry: Geometry,
    router: Router | Sequence[Router],
    weights: Weights,
    batches: list[Tokens],
    optimizer: Optimizer,
    *,
    micro_batches: list[list[int]] | None = None,
    dtype: torch.dtype = torch.float64,
    compute: torch.dtype | None = None,
) -> list[Step]:
    """One step per batch; ``router``: of all steps, or of each. Masters are kept in ``dtype``; forward and backward run
    in ``compute`` (default: the same).

    ``micro_batches``: rows of each micro-batch, which matter for losses of that scope only.
    """
    routers = [router] * len(batches) if isinstance(router, Router) else router
    masters = {name: w.detach().clone().to(dtype) for name, w in weights.items()}
    state: dict[str, tuple[Tensor, Tensor]] = {}
    biases_LE = torch.zeros(geometry.gates, geometry.experts, dtype=torch.float32)
    steps = []
    for number, (batch, router) in enumerate(zip(batches, routers, strict=True), start=1):
        used = {name: w.to(compute or dtype).detach().requires_grad_() for name, w in masters.items()}
        sets = token_sets(len(batch.ids_BS), micro_batches or [])
        biases = list(biases_LE) if router.bias_rate else None
        passed = forward(geometry, router, used, batch, biases)
        loss = cross_entropy(passed.logits_BSV, batch.labels_BS, batch.target_BS)
        total = loss
        auxiliary = []
        for number_of_gate, decision in enumerate(passed.decisions, start=1):
            losses = auxiliary_losses(router, decision, batch.padding_BS, sets)
            if passed.further_BSV is not None and number_of_gate == geometry.gates:
                assert geometry.multi_token is not None
                losses["multi_token"] = (geometry.multi_token, two_ahead(passed.further_BSV, batch))
            auxiliary.append({name: float(value.detach()) for name, (_, value) in losses.items()})
            for coefficient, value in losses.values():
                total = total + coefficient * value
        found = torch.autograd.grad(total, list(used.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(masters[name]) if g is None else g.to(dtype)
            for name, g in zip(used, found, strict=True)
        }
        norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients.values()))
        if optimizer.clip and norm + 1e-6 > optimizer.clip:
            gradients = {name: g * (optimizer.clip / (float(norm) + 1e-6)) for name, g in gradients.items()}
        _move(optimizer, masters, gradients, state, number)
        load_LE = kept_LE = torch.zeros(0, 0, dtype=torch.int64)
        if passed.decisions:
            load_LE = torch.stack([d.selected_NE.sum(dim=0) for d in passed.decisions])
            kept = [d.selected_NE if d.kept_NE is None else d.kept_NE for d in passed.decisions]
            kept_LE = torch.stack([kept_NE.sum(dim=0) for kept_NE in kept])
        if router.bias_rate:
            for bias_E, load_E in zip(biases_LE, load_LE, strict=True):
                move_bias(bias_E, load_E, router.bias_rate, router.bias_rule, router.bias_target)
        steps.append(
            Step(
                loss=float(loss.detach()),
                gradient_norm=float(norm),
                weights={name: w.clone() for name, w in masters.items()},
                auxiliary=auxiliary,
                load_LE=load_LE,
                kept_LE=kept_LE,
                biases_LE=biases_LE.clone(),
                margin=min((d.margin for d in passed.decisions), default=float("inf")),
            )
        )
    return steps


def two_ahead(logits_BSV: Tensor, batch: Tokens) -> Tensor:
    """Mean over the positions from which both of the next two tokens are targets, in the same text."""
    labels_BS, target_BS = torch.zeros_like(batch.labels_BS), torch.zeros_like(batch.target_BS)
    for b, s in (batch.target_BS[:, :-1] & batch.target_BS[:, 1:]).nonzero().tolist():
        if batch.position_BS is None or batch.position_BS[b, s + 1] > 0:
            labels_BS[b, s], target_BS[b, s] = batch.labels_BS[b, s + 1], True
    return cross_entropy(logits_BSV, labels_BS, target_BS)


def cross_entropy(logits_BSV: Tensor, labels_BS: Tensor, target_BS: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods of the targets divided by their number."""
    logits_BSV = logits_BSV if logits_BSV.dtype == torch.float64 else logits_BSV.float()
    log_probs_BSV = logits_BSV - torch.logsumexp(logits_BSV, dim=-1, keepdim=True)
    nll_BS = -log_probs_BSV.gather(2, labels_BS[..., None])[..., 0]
    return nll_BS[target_BS].sum() / target_BS.sum()


def move_bias(bias_E: Tensor, load_E: Tensor, rate: float, rule: str, target: list[float] | None) -> None:
    """Towards the experts with less than their share of the load; the mean of the bias stays 0."""
    mean = load_E.double().mean()
    if mean == 0:
        return
    target_E = torch.tensor(target or [1.0] * len(load_E), dtype=torch.float64)
    lack_E = mean * target_E / target_E.mean() - load_E.double()
    move_E = torch.sign(lack_E) if rule == "sign" else lack_E / mean
    bias_E += (rate * move_E).to(bias_E.dtype)
    bias_E -= bias_E.mean()


def _move(
    optimizer: Optimizer, masters: Weights, gradients: Weights, state: dict[str, tuple[Tensor, Tensor]], number: int
) -> None:
    for name, weight in masters.items():
        gradient = gradients[name]
        if optimizer.name == "sgd":
            weight -= optimizer.lr * gradient
            continue
        first, second = state.setdefault(name, (torch.zeros_like(weight), torch.zeros_like(weight)))
        b1, b2 = optimizer.betas
        first.mul_(b1).add_((1 - b1) * gradient)
        second.mul_(b2).add_((1 - b2) * gradient**2)
        if not optimizer.no_decay(name, weight):
            weight -= optimizer.lr * optimizer.weight_decay * weight
        weight -= optimizer.lr * (first / (1 - b1**number)) / (torch.sqrt(second / (1 - b2**number)) + optimizer.eps)
