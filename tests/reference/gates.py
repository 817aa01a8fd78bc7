"""The gates, written from their formulas over a whole batch at a time.

Suffixes: N tokens (all of the batch, padding included), H hidden, E experts, D latent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.geometry import Router


@dataclass
class Decision:
    """What one layer's gate decided for N tokens."""

    logits_NE: Tensor
    probs_NE: Tensor
    weights_NE: Tensor
    selected_NE: Tensor
    margin: float
    """Smallest distance of any real token from another selection, in logits (or in probability for a threshold)."""
    shift_NH: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What the gate's own losses need."""
    kept_NE: Tensor | None = None
    """What capacity left of the selection; None where nothing is dropped."""


def decide(
    router: Router, weights: dict[str, Tensor], x_NH: Tensor, padding_N: Tensor, bias_E: Tensor | None
) -> Decision:
    """``weights``: the gate's parameters under their own names. Arithmetic is float32 at least."""
    x_NH = x_NH if x_NH.dtype == torch.float64 else x_NH.float()
    weights = {name: w.to(x_NH.dtype) for name, w in weights.items()}
    gates = {"softmax_topk": _softmax_topk, "sigmoid_topk": _sigmoid_topk, "lpr": _lpr, "dynamic_k": _dynamic_k}
    return gates[router.gate](router, weights, x_NH, padding_N, bias_E)


def _softmax_topk(
    router: Router, weights: dict[str, Tensor], x_NH: Tensor, padding_N: Tensor, bias_E: Tensor | None
) -> Decision:
    k = router.options.get("top_k", 2)
    logits_NE = x_NH @ weights["weight"].T
    probs_NE = torch.exp(logits_NE) / torch.exp(logits_NE).sum(dim=1, keepdim=True)
    selected_NE, margin = _largest(logits_NE, k, padding_N, bias_E)
    if router.options.get("softmax", "before") == "after":
        chosen_NE = torch.exp(logits_NE) * selected_NE
        weights_NE = _normalised(chosen_NE)
    else:
        weights_NE = probs_NE * selected_NE
        if router.options.get("renormalize", True):
            weights_NE = _normalised(weights_NE)
    return Decision(logits_NE, probs_NE, weights_NE, selected_NE, margin)


def _sigmoid_topk(
    router: Router, weights: dict[str, Tensor], x_NH: Tensor, padding_N: Tensor, bias_E: Tensor | None
) -> Decision:
    """The k largest s + bias of the best groups, one token at a time."""
    k, groups = router.options.get("top_k", 2), router.options.get("num_groups", 1)
    best_groups = router.options.get("groups_per_token", 1)
    logits_NE = x_NH @ weights["weight"].T
    scores_NE = 1 / (1 + torch.exp(-logits_NE))
    size = scores_NE.shape[1] // groups
    selected_NE = torch.zeros_like(scores_NE, dtype=torch.bool)
    margin = float("inf")
    ranked_NE = scores_NE.detach() if bias_E is None else scores_NE.detach() + bias_E.to(scores_NE.dtype)
    for n, row in enumerate(ranked_NE.tolist()):
        if padding_N[n]:
            continue
        members = [range(g * size, (g + 1) * size) for g in range(groups)]
        group_scores = [sum(sorted((row[e] for e in group), reverse=True)[:2]) for group in members]
        chosen_groups, gap = _first(group_scores, range(groups), best_groups)
        margin = min(margin, gap)
        chosen, gap = _first(row, sorted(e for g in chosen_groups for e in members[g]), k)
        margin = min(margin, gap)
        selected_NE[n, chosen] = True
    weights_NE = scores_NE * selected_NE
    if router.options.get("renormalize", True):
        weights_NE = weights_NE / (weights_NE.sum(dim=1, keepdim=True) + 1e-20)
    weights_NE = weights_NE * router.options.get("scaling", 1.0)
    probs_NE = scores_NE / scores_NE.sum(dim=1, keepdim=True)
    return Decision(logits_NE, probs_NE, weights_NE, selected_NE, margin)


def _first(values: list[float], among: Iterable[int], k: int) -> tuple[list[int], float]:
    """The k indices with the largest values, equal ones by rising index, and the distance of the next one."""
    order = sorted(among, key=lambda i: (-values[i], i))
    gap = values[order[k - 1]] - values[order[k]] if k < len(order) else float("inf")
    return order[:k], gap


def _dynamic_k(
    router: Router, weights: dict[str, Tensor], x_NH: Tensor, padding_N: Tensor, bias_E: Tensor | None
) -> Decision:
    """The fewest experts whose probabilities reach the threshold together, one token at a time."""
    threshold = router.options.get("threshold", 0.8)
    least, most = router.options.get("min_k", 1), router.options.get("max_k") or weights["weight"].shape[0]
    logits_NE = x_NH @ weights["weight"].T
    probs_NE = torch.exp(logits_NE) / torch.exp(logits_NE).sum(dim=1, keepdim=True)
    selected_NE = torch.zeros_like(probs_NE, dtype=torch.bool)
    margin = float("inf")
    for n, row in enumerate(probs_NE.tolist()):
        if padding_N[n]:
            continue
        order = sorted(range(len(row)), key=lambda e: (-row[e], e))
        gathered, k = 0.0, 0
        while k < len(row) and (k == 0 or gathered < threshold):
            gathered += row[order[k]]
            k += 1
            margin = min(margin, abs(gathered - threshold))
        k = min(max(k, least), most)
        if k < len(row):
            margin = min(margin, row[order[k - 1]] - row[order[k]])
        selected_NE[n, order[:k]] = True
    return Decision(logits_NE, probs_NE, _normalised(probs_NE * selected_NE), selected_NE, margin)


def _lpr(
    router: Router, weights: dict[str, Tensor], x_NH: Tensor, padding_N: Tensor, bias_E: Tensor | None
) -> Decision:
    """Cosine of the encoded mean to each prototype; experts see the input shifted by the decoded mixture."""
    k = router.options.get("top_k", 2)
    prototypes_ED = weights["prototypes"]
    centred_NH = x_NH - x_NH.mean(dim=1, keepdim=True)
    normed_NH = centred_NH / torch.sqrt(centred_NH.square().mean(dim=1, keepdim=True) + 1e-5)
    a_NH = normed_NH * weights["norm.weight"] + weights["norm.bias"]
    a_NH = a_NH * torch.sigmoid(a_NH)
    encoded = a_NH @ weights["encoder.weight"].T + weights["encoder.bias"]
    latent = prototypes_ED.shape[1]
    mu_ND, logvar_ND = encoded[:, :latent], encoded[:, latent:]
    unit_ND = mu_ND / mu_ND.norm(dim=1, keepdim=True)
    unit_ED = prototypes_ED / prototypes_ED.norm(dim=1, keepdim=True)
    logits_NE = unit_ND @ unit_ED.T
    probs_NE = torch.exp(logits_NE) / torch.exp(logits_NE).sum(dim=1, keepdim=True)
    selected_NE, margin = _largest(logits_NE, k, padding_N, bias_E)
    weights_NE = _normalised(torch.exp(logits_NE) * selected_NE)
    shift_NH = (probs_NE @ prototypes_ED) @ weights["decoder.weight"].T + weights["decoder.bias"]
    extra = {"mu": mu_ND, "logvar": logvar_ND, "unit": unit_ND, "unit_prototypes": unit_ED, "prototypes": prototypes_ED}
    return Decision(logits_NE, probs_NE, weights_NE, selected_NE, margin, shift_NH, extra)


def _largest(logits_NE: Tensor, k: int, padding_N: Tensor, bias_E: Tensor | None) -> tuple[Tensor, float]:
    """The k largest logits (plus bias), equal ones by rising index, and the smallest margin of a real token."""
    scores_NE = logits_NE.detach() if bias_E is None else logits_NE.detach() + bias_E.to(logits_NE.dtype)
    order_NE = torch.argsort(scores_NE, dim=1, descending=True, stable=True)
    selected_NE = torch.zeros_like(scores_NE, dtype=torch.bool)
    for n in range(scores_NE.shape[0]):
        if not padding_N[n]:
            selected_NE[n, order_NE[n, :k]] = True
    ranked_NE = scores_NE.gather(1, order_NE)[~padding_N]
    if k == scores_NE.shape[1] or not ranked_NE.numel():
        return selected_NE, float("inf")
    return selected_NE, float((ranked_NE[:, k - 1] - ranked_NE[:, k]).min())


def _normalised(weights_NE: Tensor) -> Tensor:
    """Rows divided by their sum; rows of zeros (padding) stay."""
    total_N1 = weights_NE.sum(dim=1, keepdim=True)
    return weights_NE / torch.where(total_N1 == 0, torch.ones_like(total_N1), total_N1)
