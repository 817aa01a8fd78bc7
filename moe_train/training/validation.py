"""Runs a model over evaluation batches: the bridge from engine or plain model to the evaluation room."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_train.data.batches import Batch, evaluation_batches
from moe_train.data.domains import Domains, documents_path
from moe_train.data.indexed import IndexedDataset
from moe_train.data.manifest import read_token_bytes, token_bytes_path
from moe_train.evaluation.loss import evaluate
from moe_train.evaluation.result import EvaluationResult
from moe_train.model.micro_batch import MicroBatch, use
from moe_train.parallel.groups import Groups
from moe_train.routing.interface import Routing
from moe_train.training.run_config import RunConfig
from moe_train.training.step import token_batch


def token_bytes(prefix: str) -> np.ndarray | None:
    """Bytes of text per token id, written by prepare beside the data; None for data from elsewhere."""
    return read_token_bytes(prefix) if token_bytes_path(prefix).is_file() else None


def check_vocabulary(prefix: str, vocab_size: int) -> None:
    """Raises ValueError when the tokenizer that wrote the data has more ids than the model."""
    known = token_bytes(prefix)
    if known is not None and len(known) > vocab_size:
        raise ValueError(
            f"the tokenizer of {prefix} has {len(known)} ids, more than the model's vocabulary: "
            f"set model.vocab_size to at least {len(known)} (it is {vocab_size})"
        )


def check_ids(batch: Batch, prefix: str, vocab_size: int) -> None:
    """Raises ValueError when the batch holds a token that the model does not know."""
    highest = max(int(batch.ids_BS.max()), int(batch.labels_BS.max()))
    if highest >= vocab_size:
        raise ValueError(
            f"{prefix} holds token {highest}, more than model.vocab_size = {vocab_size} knows; use the vocabulary of "
            "the tokenizer that wrote the data"
        )


def forward_function(model: Callable[..., Any], groups: Groups) -> Callable[[Batch], tuple[Tensor, list[Routing]]]:
    """``forward(batch) -> (nll_BS, one Routing per MoE layer)`` of a model in evaluation mode."""

    def forward(batch: Batch) -> tuple[Tensor, list[Routing]]:
        device = groups.device
        micro_batch = MicroBatch(tokens=token_batch(batch, device), keep_routings=True)
        with torch.no_grad(), use(micro_batch):
            _, nll_BS = model(batch.ids_BS.to(device), batch.labels_BS.to(device), batch.target_BS.to(device))
        return nll_BS, [micro_batch.routings[layer] for layer in sorted(micro_batch.routings)]

    return forward


def validate(
    model: Callable[..., Any],
    config: RunConfig,
    groups: Groups,
    prefix: str,
    *,
    max_batches: int | None = None,
    with_domains: bool = False,
) -> EvaluationResult:
    """Loss and expert load on a data set; collective over all ranks. ``model`` must be in evaluation mode."""
    check_vocabulary(prefix, config.model.vocab_size)
    dataset = IndexedDataset(prefix)
    domains = Domains(dataset) if with_domains and documents_path(prefix).is_file() else None
    everything = evaluation_batches(
        dataset,
        config.data.sequence_length,
        config.train.micro_batch_size,
        rank=groups.data_rank,
        dp_size=groups.data_size,
        max_batches=max_batches,
        domains=domains,
    )
    return evaluate(
        forward_function(model, groups),
        _checked(everything, prefix, config.model.vocab_size),
        num_layers=config.model.num_layers,
        num_experts=config.model.moe.num_experts,
        token_bytes=token_bytes(prefix),
        domains=domains.names if domains else None,
        reduce=groups.sum_over_data,
        device=groups.device,
    )


def _checked(batches: Iterable[Batch], prefix: str, vocab_size: int) -> Iterator[Batch]:
    for batch in batches:
        check_ids(batch, prefix, vocab_size)
        yield batch
