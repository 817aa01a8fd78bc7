"""Evaluation of documents one by one: cut at a length, padded, none sees another.

The test protocol of LPR's published code (arXiv 2506.21328, evaluate.py): documents cut at 512 tokens, batches of 25.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_train.data.dataset import open_dataset, open_loss_mask, sidecar_stem
from moe_train.data.document_batches import DocumentSet
from moe_train.data.domains import Domains, documents_path
from moe_train.data.manifest import manifest_path, recorded_tokenizer
from moe_train.data.options import Blend, members_of
from moe_train.evaluation.batch_average import BatchAverage
from moe_train.evaluation.loss import evaluate
from moe_train.evaluation.result import EvaluationResult
from moe_train.model.families import evaluated_moe_layers
from moe_train.parallel.groups import Groups
from moe_train.training.run_config import RunConfig
from moe_train.training.validation import Watcher, check_vocabulary, checked, forward_function, token_bytes, watched


@dataclass(frozen=True)
class DocumentProtocol:
    max_length: int = 512
    """Tokens of a document that are used; the first one is no target."""
    batch_documents: int = 25
    """Documents of a batch of the average of batch means."""
    max_batches: int | None = None
    """At most so many batches per rank; their documents are spread evenly over the data set."""


def validate_documents(
    model: Callable[..., Any],
    config: RunConfig,
    groups: Groups,
    data: Blend,
    protocol: DocumentProtocol,
    watchers: Callable[..., Sequence[Watcher]] | None = None,
) -> tuple[EvaluationResult, dict[str, Any]]:
    """Loss and expert load over documents, and the key `documents` of docs/evaluation.md; collective over all ranks.

    ``model`` must be in evaluation mode. Tokens that end documents are no targets where the manifest names them, and of
    instruction data only what the loss counts is one. ValueError for a blend. ``watchers`` makes those that see each
    batch and its routings, from the names of the data, samples [B] to their data set, and the labels of domains.
    """
    names = [name for name, _ in members_of(data)]
    if len(names) != 1:
        raise ValueError(f"documents are evaluated in one data set at a time; choose one by --data: {', '.join(names)}")
    [name] = names
    stem = sidecar_stem(name)
    check_vocabulary(names, config.model.vocab_size)
    dataset = open_dataset(name)
    micro_size = config.train.micro_batch_size
    batches = protocol.max_batches
    documents = DocumentSet(
        dataset,
        protocol.max_length,
        eod_id=recorded_tokenizer(stem)["eod_id"] if manifest_path(stem).is_file() else None,
        loss_mask=open_loss_mask(dataset),
        limit=None if batches is None else batches * micro_size * groups.data_size,
    )
    domains = Domains(dataset) if documents_path(stem).is_file() else None
    labels = domains.names if domains else None
    more = watchers([name], lambda sample_B: sample_B.clamp(max=0), labels) if watchers is not None else ()
    average = BatchAverage(documents.index_D, protocol.batch_documents, groups.device)
    everything = documents.batches(micro_size, rank=groups.data_rank, dp_size=groups.data_size, domains=domains)
    result = evaluate(
        watched(forward_function(model, groups), [average, *more]),
        checked(everything, names, config.model.vocab_size),
        layers=evaluated_moe_layers(config.model),
        num_experts=config.model.moe.num_experts,
        token_bytes=token_bytes(name),
        domains=labels,
        reduce=groups.sum_over_data,
        device=groups.device,
    )
    counts = {"documents": len(documents), "truncated": documents.truncated, "max_length": protocol.max_length}
    return result, counts | average.to_json(average.loss(groups.sum_over_data))
