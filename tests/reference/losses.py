"""Auxiliary losses over a whole global batch: each is a mean over token sets, a set being a list of sequences.

Scopes differ in the sets alone: every sequence is one, or every micro-batch, or all sequences together are.

Suffixes: B sequences, S tokens per sequence, N = B * S tokens (n = b * S + s), E experts, D latent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference.gates import Decision
from tests.reference.geometry import Router

Sets = dict[str, list[list[int]]]


def token_sets(sequences: int, micro_batches: list[list[int]]) -> Sets:
    """The sequences of each set, by scope."""
    every = list(range(sequences))
    return {"sequence": [[b] for b in every], "micro_batch": micro_batches, "global_batch": [every]}


def auxiliary_losses(
    router: Router, decision: Decision, padding_BS: Tensor, sets: Sets
) -> dict[str, tuple[float, Tensor]]:
    """Name -> (coefficient, mean over the sets that hold a token)."""
    losses: dict[str, tuple[float, Tensor]] = {}

    def mean_over(scope: str, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        masks = [_mask(padding_BS, rows) for rows in sets[scope]]
        return torch.stack([loss_of(mask_N) for mask_N in masks if mask_N.any()]).mean()

    every_N = ~padding_BS.flatten()
    if router.switch is not None:
        switch = mean_over(router.switch_scope, lambda mask_N: _switch(decision, mask_N))
        losses["switch"] = (router.switch, switch)
    if router.z is not None:
        z_N = torch.log(torch.exp(decision.logits_NE).sum(dim=1)) ** 2
        losses["z"] = (router.z, z_N[every_N].mean())
    if router.importance is not None:
        amounts_NE = decision.probs_NE if router.importance_of == "probabilities" else decision.weights_NE
        importance = mean_over(router.importance_scope, lambda mask_N: _variation(amounts_NE[mask_N].sum(dim=0)))
        losses["importance"] = (router.importance, importance)
    if router.gate == "lpr":
        losses |= _lpr(router, decision, mean_over)
    return losses


def _mask(padding_BS: Tensor, rows: list[int]) -> Tensor:
    """Real tokens of some sequences, [N]."""
    mask_BS = torch.zeros_like(padding_BS)
    mask_BS[rows] = True
    return (mask_BS & ~padding_BS).flatten()


def _switch(decision: Decision, mask_N: Tensor) -> Tensor:
    """E * sum over e of (share of the selected slots) * (mean probability)."""
    count_E = decision.selected_NE[mask_N].sum(dim=0).to(decision.probs_NE.dtype)
    probability_E = decision.probs_NE[mask_N].mean(dim=0)
    return len(count_E) * (count_E / count_E.sum() * probability_E).sum()


def _variation(amount_E: Tensor) -> Tensor:
    """Variance over squared mean."""
    return amount_E.var(correction=0) / amount_E.mean() ** 2


def _lpr(router: Router, decision: Decision, mean_over: Callable[..., Tensor]) -> dict[str, tuple[float, Tensor]]:
    options, extra = router.options, decision.extra
    scope, coefficient = options.get("scope", "sequence"), options.get("coefficient", 0.01)
    diversity = coefficient * options.get("diversity_weight", 1.0)
    kl_N = 0.5 * (extra["mu"] ** 2 + torch.exp(extra["logvar"]) - 1 - extra["logvar"]).sum(dim=1)
    losses = {
        "lpr_diversity": (diversity, mean_over(scope, lambda mask_N: _gram(extra["unit"][mask_N]))),
        "lpr_prototype_diversity": (diversity, _gram(extra["unit_prototypes"])),
        "lpr_kl": (coefficient * options.get("kl_weight", 0.01), mean_over(scope, lambda mask_N: kl_N[mask_N].mean())),
        "lpr_alignment": (
            coefficient * options.get("align_weight", 0.05),
            mean_over(scope, lambda mask_N: _alignment(decision, mask_N)),
        ),
    }
    return {name: loss for name, loss in losses.items() if loss[0]}


def _gram(unit_MD: Tensor) -> Tensor:
    """Mean over all pairs of (u_i . u_j - [i = j])^2, from the dense Gram matrix."""
    gram_MM = unit_MD @ unit_MD.T - torch.eye(len(unit_MD), dtype=unit_MD.dtype)
    return (gram_MM**2).mean()


def _alignment(decision: Decision, mask_N: Tensor) -> Tensor:
    """Mean absolute distance of each prototype from the weighted mean of the latents that chose it."""
    weights_ME, mu_MD = decision.weights_NE[mask_N].detach(), decision.extra["mu"][mask_N].detach()
    prototypes_ED = decision.extra["prototypes"]
    distances = []
    for expert, prototype_D in enumerate(prototypes_ED):
        mass = weights_ME[:, expert].sum()
        if mass > 0:
            target_D = (weights_ME[:, expert, None] * mu_MD).sum(dim=0) / mass
            distances.append((prototype_D - target_D).abs().mean())
        else:
            distances.append(torch.zeros((), dtype=prototype_D.dtype))
    return torch.stack(distances).mean()
