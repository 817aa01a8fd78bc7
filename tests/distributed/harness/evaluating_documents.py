"""Evaluation of documents one by one on every rank of a pool, and of each document by itself."""

from __future__ import annotations

from typing import Any

import torch

from moe_train.data.batches import Batch
from moe_train.evaluation.result import EvaluationResult
from moe_train.model.micro_batch import MicroBatch, use
from moe_train.training.document_validation import DocumentProtocol, validate_documents
from moe_train.training.step import token_batch
from tests.distributed.harness.evaluating import run_config
from tests.distributed.harness.training import Case, build_model, groups_of


def evaluate_documents(
    case: Case, prefix: str, micro_batch: int, max_length: int, batch_documents: int
) -> tuple[EvaluationResult, dict[str, Any]]:
    """Evaluation of documents one by one, this rank's share."""
    groups = groups_of(case)
    config = run_config(case, micro_batch)
    protocol = DocumentProtocol(max_length=max_length, batch_documents=batch_documents)
    return validate_documents(build_model(case).eval(), config, groups, prefix, protocol)


def each_alone(case: Case, documents: list[list[int]]) -> list[tuple[float, list[list[int]]]]:
    """For each document: sum of the negative log likelihoods of all tokens but the first, from a forward pass of this
    document only; and slots per layer and expert."""
    groups_of(case)
    model = build_model(case).eval()
    found = []
    for document in documents:
        ids_BS = torch.tensor([document[:-1]], dtype=torch.int64)
        if not ids_BS.numel():
            found.append((0.0, [[0] * case.model.moe.num_experts] * case.model.num_layers))
            continue
        every = torch.ones_like(ids_BS, dtype=torch.bool)
        batch = Batch(ids_BS, torch.tensor([document[1:]]), every, ~every, torch.zeros(1, dtype=torch.int64))
        micro_batch = MicroBatch(tokens=token_batch(batch, torch.device("cpu")), keep_routings=True)
        with torch.no_grad(), use(micro_batch):
            _, nll_BS = model(batch.ids_BS, batch.labels_BS, batch.target_BS)
        load = [micro_batch.routings[layer].selected_TE.sum(0).tolist() for layer in sorted(micro_batch.routings)]
        found.append((float(nll_BS.double().sum()), load))
    return found
