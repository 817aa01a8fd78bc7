"""From raw sums to the records of metrics.jsonl. Pure functions: what is logged can be computed again from the sums.

Suffixes: L MoE layers in order, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moe_train.routing.statistics import balance_statistics, gini_floor, spread


@dataclass(frozen=True)
class IntervalSums:
    """What was measured since the last record, summed over all steps of the interval, micro-batches and ranks."""

    steps: int
    seconds: float
    """Wall-clock time of these steps."""
    tokens: int
    """Non-padding input tokens; every one of them passed every MoE layer once."""
    loss_sum: float
    """Sum of the negative log likelihoods in nats."""
    loss_count: int
    """Target tokens."""
    layers: Sequence[int]
    """Numbers of the MoE layers among all layers, from 0; empty where none has experts."""
    load_LE: Tensor
    """int64, slots given to each expert before capacity."""
    kept_LE: Tensor
    """int64, slots that were left after capacity."""
    k_histogram_LN: Tensor | None = None
    """int64, tokens with 0, 1, ... E experts; None where all have the same number."""
    losses: Sequence[Mapping[str, tuple[float, float]]] = field(default_factory=tuple)
    """One mapping per MoE layer: name of the auxiliary loss -> (sum, count), without coefficient."""


@dataclass(frozen=True)
class DeviceFacts:
    """What MFU needs to know; without a peak there is no MFU."""

    devices: int = 1
    flops_without_experts: float | None = None
    """Forward and backward FLOPs per token in everything but the routed experts."""
    flops_per_slot: float = 0.0
    """Those of one routed expert for one token."""
    peak_flops: float | None = None
    """Dense peak of one device in FLOP/s."""


def build_record(
    *,
    step: int,
    tokens: int,
    lr: float,
    grad_norm: float,
    memory_bytes: int,
    sums: IntervalSums,
    facts: DeviceFacts | None = None,
    per_layer: bool = True,
    max_layer_tags: int | None = None,
) -> dict[str, Any]:
    """The record of kind "train".

    ``step`` and ``tokens`` (consumed so far) at the end of the interval, ``lr`` and ``grad_norm`` (before clipping) of
    its last step, ``memory_bytes`` the highest use of one device. ``loss`` is the mean over all target tokens of the
    interval and ``load`` the exact counts of the interval, in the order of ``layers``; a model without experts has
    neither, and no balance. Each balance statistic is there as its mean over the layers and, where there are several,
    its spread over them; by layer (with ``per_layer``) only where that takes at most ``max_layer_tags`` tags.
    """
    assert sums.steps > 0 and sums.load_LE.shape == sums.kept_LE.shape and len(sums.layers) == len(sums.load_LE)
    per_second = sums.tokens / max(sums.seconds, 1e-9)
    record: dict[str, Any] = {
        "kind": "train",
        "step": step,
        "tokens": tokens,
        "loss": _ratio(sums.loss_sum, sums.loss_count),
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_second": per_second,
        "step_seconds": sums.seconds / sums.steps,
        "memory_bytes": memory_bytes,
    }
    mfu = model_flops_utilisation(sums, facts or DeviceFacts())
    if mfu is not None:
        record["mfu"] = mfu
    record |= {f"aux/{name}": value for name, value in mean_losses(sums.losses).items()}
    if not sums.layers:
        return record
    layers = layer_statistics(sums.load_LE, sums.kept_LE, sums.tokens)
    record |= {f"balance/{name}": value for name, value in mean_over_layers(layers).items()}
    record |= {f"balance/{name}": value for name, value in spread_over_layers(layers).items()}
    if per_layer and (max_layer_tags is None or sum(map(len, layers)) <= max_layer_tags):
        for number, layer in zip(sums.layers, layers, strict=True):
            record |= {f"balance/layer_{number}/{name}": value for name, value in layer.items()}
    record["layers"] = list(sums.layers)
    record["load"] = sums.load_LE.tolist()
    if sums.k_histogram_LN is not None:
        record["k_histogram"] = sums.k_histogram_LN.tolist()
    return record


def build_eval_record(step: int, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The record of kind "eval" from the JSON object of an evaluation (moe_train.evaluation.loss)."""
    record = {
        "kind": "eval",
        "step": step,
        "eval/loss": evaluation["loss"],
        "eval/perplexity": evaluation["perplexity"],
        "eval/tokens": evaluation["tokens"],
    }
    if evaluation["mean"]:
        record["balance"] = dict(evaluation["mean"])
        if len(evaluation.get("layers", ())) > 1:
            record["balance"] |= {
                f"{name}/{place}": value
                for name, places in evaluation["over_layers"].items()
                for place, value in places.items()
            }
    if evaluation.get("bits_per_byte") is not None:
        record["eval/bits_per_byte"] = evaluation["bits_per_byte"]
    return record


def model_flops_utilisation(sums: IntervalSums, facts: DeviceFacts) -> float | None:
    """FLOPs of the model per second / dense peak of all devices; None when either is unknown. Experts count for the
    slots that they computed, so that a gate may give tokens any number of them, and drop some."""
    if not facts.flops_without_experts or not facts.peak_flops:
        return None
    flops = sums.tokens * facts.flops_without_experts + int(sums.kept_LE.sum()) * facts.flops_per_slot
    return flops / max(sums.seconds, 1e-9) / (facts.peak_flops * facts.devices)


def mean_losses(losses: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """sum / count per layer, then the mean over the layers that have this loss."""
    values: dict[str, list[float]] = {}
    for layer in losses:
        for name, (total, count) in layer.items():
            values.setdefault(name, []).append(_ratio(total, count))
    return {name: sum(v) / len(v) for name, v in values.items()}


def layer_statistics(load_LE: Tensor, kept_LE: Tensor, tokens: int) -> list[dict[str, float]]:
    """Balance statistics of each layer, and the finite-sample floor of its Gini."""
    return [
        {**balance_statistics(load_E, kept_E, tokens), "gini_floor": gini_floor(int(load_E.sum()), len(load_E))}
        for load_E, kept_E in zip(load_LE, kept_LE, strict=True)
    ]


def mean_over_layers(layers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each statistic over the layers; empty without layers."""
    if not layers:
        return {}
    return {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}


def spread_over_layers(layers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """``<statistic>/min``, ``/p25``, ``/median``, ``/p75`` and ``/max``; empty for fewer than two layers."""
    if len(layers) < 2:
        return {}
    return {
        f"{name}/{place}": value
        for name in layers[0]
        for place, value in spread([layer[name] for layer in layers]).items()
    }


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
