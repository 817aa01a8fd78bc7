"""Token-level loss, perplexity, bits per byte and expert load over a whole data set, exact for any batch composition,
any number of data-parallel ranks and an uneven last batch: everything is a sum over tokens, divided once at the end.

Suffixes: B sequences, S tokens per sequence, T = S * B tokens (token t = s * B + b), E experts, L MoE layers,
D domains plus one last row for tokens without a domain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_train.data.batches import Batch
from moe_train.evaluation.mutual_information import domain_information
from moe_train.evaluation.result import DomainResult, EvaluationResult, LayerResult
from moe_train.routing.interface import Routing
from moe_train.routing.statistics import balance_statistics, gini_floor

Forward = Callable[[Batch], tuple[Tensor, list[Routing]]]


def identity(sums: Tensor) -> Tensor:
    """The reduction of a single process."""
    return sums


@dataclass
class Sums:
    """Additive statistics; float64 for likelihoods, int64 for everything that is counted."""

    nll_D: Tensor
    target_tokens_D: Tensor
    target_bytes_D: Tensor
    routed_tokens_D: Tensor
    load_LDE: Tensor
    kept_LDE: Tensor

    @classmethod
    def zeros(cls, layers: int, domains: int, experts: int, device: torch.device) -> Sums:
        def counts(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(
            nll_D=torch.zeros(domains, dtype=torch.float64, device=device),
            target_tokens_D=counts(domains),
            target_bytes_D=counts(domains),
            routed_tokens_D=counts(domains),
            load_LDE=counts(layers, domains, experts),
            kept_LDE=counts(layers, domains, experts),
        )

    def add(self, batch: Batch, bytes_V: Tensor | None, nll_BS: Tensor, routings: Sequence[Routing]) -> None:
        """Adds one batch of this rank."""
        device = self.nll_D.device
        target_BS = batch.target_BS.to(device)
        unknown = len(self.nll_D) - 1
        domain_BS = torch.full_like(batch.labels_BS, unknown)
        if batch.domain_BS is not None:
            known = (batch.domain_BS >= 0) & (batch.domain_BS < unknown)
            domain_BS = torch.where(known, batch.domain_BS, domain_BS)
        domain_BS = domain_BS.to(device)

        # Masked, not multiplied: what stands at a position without a target may be NaN.
        nll_BS = nll_BS.detach().to(device, torch.float64).masked_fill(~target_BS, 0.0)
        self.nll_D.index_add_(0, domain_BS.reshape(-1), nll_BS.reshape(-1))
        self.target_tokens_D.index_add_(0, domain_BS.reshape(-1), target_BS.reshape(-1).to(torch.int64))
        if bytes_V is not None:
            bytes_BS = _target_bytes(batch, bytes_V).to(device)
            self.target_bytes_D.index_add_(0, domain_BS.reshape(-1), bytes_BS.reshape(-1))

        routed_T = ~batch.padding_BS.to(device).t().reshape(-1)
        domain_T = domain_BS.t().reshape(-1)
        self.routed_tokens_D.index_add_(0, domain_T, routed_T.to(torch.int64))
        assert len(routings) == len(self.load_LDE), f"{len(routings)} routings for {len(self.load_LDE)} MoE layers"
        for layer, routing in enumerate(routings):
            for counts_LDE, chosen_TE in ((self.load_LDE, routing.selected_TE), (self.kept_LDE, routing.kept_TE)):
                assert len(chosen_TE) == len(routed_T), "a routing does not have one row per token of the batch"
                counts_LDE[layer].index_add_(0, domain_T, (chosen_TE.to(device) & routed_T[:, None]).to(torch.int64))

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> Sums:
        """Summed over the ranks: two reductions, whatever the number of layers; every rank must call it."""
        counts = (self.target_tokens_D, self.target_bytes_D, self.routed_tokens_D, self.load_LDE, self.kept_LDE)
        flat = reduce(torch.cat([count.reshape(-1) for count in counts]))
        parts = [
            part.view_as(count)
            for part, count in zip(flat.split([count.numel() for count in counts]), counts, strict=True)
        ]
        return Sums(reduce(self.nll_D.clone()).cpu(), *(part.cpu() for part in parts))


@torch.no_grad()
def evaluate(
    forward: Forward,
    batches: Iterable[Batch],
    *,
    layers: Sequence[int],
    num_experts: int,
    token_bytes: Tensor | np.ndarray | None = None,
    domains: Sequence[str] | None = None,
    reduce: Callable[[Tensor], Tensor] = identity,
    device: torch.device | str = "cpu",
) -> EvaluationResult:
    """Runs ``forward`` over ``batches`` and sums.

    ``forward(batch)`` takes a batch on the CPU and returns the negative log likelihood of each label [B, S] (float32,
    nats, no auxiliary loss in it) and one Routing per MoE layer; ``layers`` are the numbers of those, in
    that order. ``token_bytes`` [V]: bytes of text that each token
    stands for, 0 for special tokens. ``domains``: names by domain number; a token belongs to the domain of the position
    that predicts it. ``reduce`` sums a tensor (float64 or int64, on ``device``) over the data-parallel ranks; every
    rank must bring the same number of batches. ValueError when there is nothing to predict or a label has no entry in
    ``token_bytes``.
    """
    device = torch.device(device)
    bytes_V = None if token_bytes is None else torch.as_tensor(token_bytes).to("cpu", torch.int64)
    sums = Sums.zeros(len(layers), len(domains or ()) + 1, num_experts, device)
    for batch in batches:
        nll_BS, routings = forward(batch)
        sums.add(batch, bytes_V, nll_BS, routings)
    return _result(sums.reduced(reduce), layers, list(domains or ()), with_bytes=bytes_V is not None)


def _target_bytes(batch: Batch, bytes_V: Tensor) -> Tensor:
    labels_BS = batch.labels_BS.masked_fill(~batch.target_BS, 0)
    if labels_BS.numel() and int(labels_BS.max()) >= len(bytes_V):
        raise ValueError(
            f"token {int(labels_BS.max())} of the data is not in the table of token bytes, which has {len(bytes_V)} "
            "entries; the data and the table come from different tokenizers"
        )
    return bytes_V[labels_BS].masked_fill(~batch.target_BS, 0)


def _result(sums: Sums, layers: Sequence[int], domains: list[str], *, with_bytes: bool) -> EvaluationResult:
    tokens = int(sums.target_tokens_D.sum())
    if tokens == 0:
        raise ValueError("the data hold no token to predict, so there is no loss to compute")
    routed = int(sums.routed_tokens_D.sum())
    total_bytes = int(sums.target_bytes_D.sum()) if with_bytes else None
    loss = float(sums.nll_D.sum()) / tokens
    return EvaluationResult(
        loss=loss,
        tokens=tokens,
        bytes=total_bytes,
        bits_per_byte=bits_per_byte(loss * tokens, total_bytes),
        routed_tokens=routed,
        layers=[
            _layer(number, load_DE, kept_DE.sum(0), routed)
            for number, load_DE, kept_DE in zip(layers, sums.load_LDE, sums.kept_LDE, strict=True)
        ],
        domains={
            name: _domain(sums, number, with_bytes)
            for number, name in enumerate([*domains, "(none)"])
            if domains and (number < len(domains) or int(sums.routed_tokens_D[number]) > 0)
        },
    )


def _layer(number: int, load_DE: Tensor, kept_E: Tensor, tokens: int) -> LayerResult:
    load_E = load_DE.sum(0)
    # The last row has tokens without a domain.
    information = domain_information(load_DE[:-1].tolist())
    return LayerResult(
        layer=number,
        statistics=balance_statistics(load_E, kept_E, tokens),
        gini_floor=float(gini_floor(int(load_E.sum()), len(load_E))),
        load=load_E.tolist(),
        kept=kept_E.tolist(),
        more=information or {},
    )


def _domain(sums: Sums, number: int, with_bytes: bool) -> DomainResult:
    tokens = int(sums.target_tokens_D[number])
    nll = float(sums.nll_D[number])
    total_bytes = int(sums.target_bytes_D[number]) if with_bytes else None
    return DomainResult(
        loss=nll / tokens if tokens else None,
        tokens=tokens,
        bytes=total_bytes,
        bits_per_byte=bits_per_byte(nll, total_bytes) if tokens else None,
        load=sums.load_LDE[:, number].tolist(),
    )


def bits_per_byte(nll_sum: float, total_bytes: int | None) -> float | None:
    """nll_sum / (ln 2 * bytes): bits that the model needs per byte of text. End-of-document tokens stand for no byte,
    but their likelihood is part of the sum: without them the text could not be decoded. None without bytes."""
    return nll_sum / (math.log(2) * total_bytes) if total_bytes else None
