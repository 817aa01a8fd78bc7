"""Runs a model over evaluation batches: the bridge from engine or plain model to the evaluation room."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_train.data.batches import Batch, evaluation_batches
from moe_train.data.dataset import sidecar_stem
from moe_train.data.domains import documents_path, renumber
from moe_train.data.manifest import read_token_bytes, token_bytes_path
from moe_train.data.members import check_one_tokenizer, open_reader
from moe_train.data.options import Blend, members_of
from moe_train.evaluation.loss import evaluate
from moe_train.evaluation.result import EvaluationResult
from moe_train.model.micro_batch import MicroBatch, use
from moe_train.parallel.groups import Groups
from moe_train.parallel.once import once_per_node
from moe_train.routing.interface import Routing
from moe_train.training.run_config import RunConfig
from moe_train.training.step import batch_texts, token_batch


def token_bytes(name: str) -> np.ndarray | None:
    """Bytes of text per token id, written by prepare beside the data; None for data from elsewhere."""
    stem = sidecar_stem(name)
    return read_token_bytes(stem) if token_bytes_path(stem).is_file() else None


def check_vocabulary(names: Sequence[str], vocab_size: int) -> None:
    """Raises ValueError when the tokenizer that wrote a data set has more ids than the model, or when there are
    several tokenizers."""
    check_one_tokenizer(names)
    for name in names:
        known = token_bytes(name)
        if known is not None and len(known) > vocab_size:
            raise ValueError(
                f"the tokenizer of {name} has {len(known)} ids, more than the model's vocabulary: "
                f"set model.vocab_size to at least {len(known)} (it is {vocab_size})"
            )


def check_ids(batch: Batch, names: Sequence[str], vocab_size: int) -> None:
    """Raises ValueError when the batch holds a token that the model does not know."""
    highest = max(int(batch.ids_BS.max()), int(batch.labels_BS.max()))
    if highest >= vocab_size:
        raise ValueError(
            f"{' or '.join(names)} holds token {highest}, more than model.vocab_size = {vocab_size} knows; "
            "use the vocabulary of the tokenizer that wrote the data"
        )


def forward_function(model: Callable[..., Any], groups: Groups) -> Callable[[Batch], tuple[Tensor, list[Routing]]]:
    """``forward(batch) -> (nll_BS, one Routing per MoE layer)`` of a model in evaluation mode."""

    def forward(batch: Batch) -> tuple[Tensor, list[Routing]]:
        device = groups.device
        tokens, texts = token_batch(batch, device), batch_texts(batch, device)
        micro_batch = MicroBatch(tokens=tokens, texts=texts, keep_routings=True)
        with torch.no_grad(), use(micro_batch):
            _, nll_BS = model(batch.ids_BS.to(device), batch.labels_BS.to(device), batch.target_BS.to(device))
        return nll_BS, [micro_batch.routings[layer] for layer in sorted(micro_batch.routings)]

    return forward


def validate(
    model: Callable[..., Any],
    config: RunConfig,
    groups: Groups,
    data: Blend,
    *,
    cache: Path,
    max_batches: int | None = None,
    with_domains: bool = False,
) -> EvaluationResult:
    """Loss and expert load on one or several data sets; collective over all ranks.

    ``model`` must be in evaluation mode. ``cache``: folder for the index of samples where the configuration needs one.
    """
    names, weights = zip(*members_of(data), strict=True)
    check_vocabulary(names, config.model.vocab_size)
    readers = [
        open_reader(
            name,
            config.data,
            cache=cache,
            once=once_per_node,
            with_domains=with_domains and documents_path(sidecar_stem(name)).is_file(),
        )
        for name in names
    ]
    domains = [reader.domains for reader in readers if reader.domains is not None]
    labels = renumber(domains) if domains else None
    everything = evaluation_batches(
        readers,
        config.train.micro_batch_size,
        rank=groups.data_rank,
        dp_size=groups.data_size,
        max_batches=max_batches,
        weights=None if None in weights else weights,
    )
    return evaluate(
        forward_function(model, groups),
        _checked(everything, names, config.model.vocab_size),
        num_layers=config.model.num_layers,
        num_experts=config.model.moe.num_experts,
        token_bytes=_common_token_bytes(names),
        domains=labels,
        reduce=groups.sum_over_data,
        device=groups.device,
    )


def _common_token_bytes(names: Sequence[str]) -> np.ndarray | None:
    """None where one of the data sets has none. They have one tokenizer (`check_vocabulary`)."""
    tables = [token_bytes(name) for name in names]
    return None if any(table is None for table in tables) else tables[0]


def _checked(batches: Iterable[Batch], names: Sequence[str], vocab_size: int) -> Iterator[Batch]:
    for batch in batches:
        check_ids(batch, names, vocab_size)
        yield batch
