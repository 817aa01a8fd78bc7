"""Runs a model over evaluation batches: the bridge from engine or plain model to the evaluation room."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moe_train.data.batches import Batch, evaluation_batches, evaluation_samples
from moe_train.data.dataset import sidecar_stem
from moe_train.data.domains import documents_path, renumber
from moe_train.data.manifest import read_token_bytes, token_bytes_path
from moe_train.data.members import check_one_tokenizer, open_reader
from moe_train.data.options import Blend, members_of
from moe_train.evaluation.loss import Forward, evaluate
from moe_train.evaluation.result import EvaluationResult
from moe_train.model.families import evaluated_moe_layers
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


class Watcher(Protocol):
    """Something that looks on while a model is evaluated."""

    def watch(self, forward: Forward) -> Forward:
        """The same function, whose results are looked at on the way."""
        ...


def watched(forward: Forward, watchers: Sequence[Watcher]) -> Forward:
    """``forward`` with every watcher around it."""
    for watcher in watchers:
        forward = watcher.watch(forward)
    return forward


@dataclass(frozen=True)
class BeforeEachBatch:
    """A watcher that does something else in between; what it raises ends the evaluation."""

    action: Callable[[], None]

    def watch(self, forward: Forward) -> Forward:
        def watching(batch: Batch) -> tuple[Tensor, list[Routing]]:
            self.action()
            return forward(batch)

        return watching


class ValidationSet:
    """One or several data sets, opened once and evaluated as often as asked for, spread over the data-parallel ranks.

    cache: folder for the index of samples where the configuration needs one.   max_batches: at most so many per rank.
    with_domains: also loss and load of each domain: of the labels, or of the data sets where several have none.
    Must be made by all ranks. Errors: ValueError, FileNotFoundError where a data set is not there, is damaged or too
    small, or is of another tokenizer than the model.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        data: Blend,
        *,
        cache: Path,
        max_batches: int | None = None,
        with_domains: bool = False,
    ) -> None:
        self.names, weights = zip(*members_of(data), strict=True)
        check_vocabulary(self.names, config.model.vocab_size)
        self.config, self.groups, self.max_batches = config, groups, max_batches
        self.weights: Sequence[float] | None = None if None in weights else weights
        self.readers = [
            open_reader(
                name,
                config.data,
                cache=cache,
                once=partial(once_per_node, what="the index of samples"),
                with_domains=with_domains and documents_path(sidecar_stem(name)).is_file(),
            )
            for name in self.names
        ]
        domains = [reader.domains for reader in self.readers if reader.domains is not None]
        self.labels = renumber(domains) if domains else None
        self.ends = np.cumsum([reader.evaluation_count for reader in self.readers])
        """Behind the last sample of each data set, counted through all of them."""
        self.by_name = with_domains and self.labels is None and len(self.names) > 1
        if self.by_name:  # Where documents have no labels, data sets are the domains.
            self.labels = list(self.names)
        tables = [token_bytes(name) for name in self.names]
        # They have one tokenizer. Where one has no table, not all of the text could be counted.
        self.token_bytes = None if any(table is None for table in tables) else tables[0]
        evaluation_samples(self.readers, self.weights, None)

    def check(self) -> None:
        """ValueError where a batch holds a token that the model does not know. Reads this rank's batches, but only
        where no table of a tokenizer, which was compared already, says which tokens there can be."""
        if self.token_bytes is None:
            for _ in self._batches():
                pass

    def evaluate(self, model: Callable[..., Any], watchers: Sequence[Watcher] = ()) -> EvaluationResult:
        """Loss and expert load of a model in evaluation mode; collective over all ranks. ``watchers`` see each batch
        and its routings."""
        return evaluate(
            watched(forward_function(model, self.groups), watchers),
            self._batches(),
            layers=evaluated_moe_layers(self.config.model),
            num_experts=self.config.model.moe.num_experts,
            token_bytes=self.token_bytes,
            domains=self.labels,
            reduce=self.groups.sum_over_data,
            device=self.groups.device,
        )

    def _batches(self) -> Iterator[Batch]:
        batches = evaluation_batches(
            self.readers,
            self.config.train.micro_batch_size,
            rank=self.groups.data_rank,
            dp_size=self.groups.data_size,
            max_batches=self.max_batches,
            weights=self.weights,
        )
        batches = checked(batches, self.names, self.config.model.vocab_size)
        return map(self._with_names, batches) if self.by_name else batches

    def members(self, sample_B: Tensor) -> Tensor:
        """int64 [B]: number of the data set of each sample; -1 for a row that is padding only."""
        member_B = torch.from_numpy(np.searchsorted(self.ends, sample_B.numpy(), side="right"))
        return member_B.masked_fill(sample_B < 0, -1)

    def _with_names(self, batch: Batch) -> Batch:
        member_BS = self.members(batch.sample_B)[:, None].expand(batch.ids_BS.shape)
        return replace(batch, domain_BS=member_BS.masked_fill(batch.padding_BS, -1))


def checked(batches: Iterable[Batch], names: Sequence[str], vocab_size: int) -> Iterator[Batch]:
    """The batches, each after `check_ids`."""
    for batch in batches:
        check_ids(batch, names, vocab_size)
        yield batch
