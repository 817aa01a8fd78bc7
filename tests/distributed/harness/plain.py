"""The model of this package in a loop without DeepSpeed: bfloat16 parameters, float32 masters and gradient sums."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_train.data.batches import Batch
from moe_train.model.micro_batch import MicroBatch, as_root, use
from moe_train.model.moe_layer import moe_layers
from moe_train.training.step import counts, token_batch
from tests.distributed.harness.training import Case, build_model, groups_for


def bfloat16_loop(case: Case, pieces: int) -> tuple[list[float], list[dict[str, Tensor]]]:
    """SGD over each global batch in so many pieces, one after the other: loss and masters after every step.

    As in the engine, a piece's gradients are bfloat16 and are added in float32, and masters start from the rounded
    weights.
    """
    groups = groups_for(1)
    model = build_model(case).bfloat16()
    parameters = dict(model.named_parameters())
    masters = {name: p.detach().float() for name, p in parameters.items()}
    losses, history = [], []
    for step in range(case.steps):
        everything = case.tokens(step)
        size = case.sequences // pieces
        rows = [slice(i * size, (i + 1) * size) for i in range(pieces)]
        shares = [everything.rows(r) for r in rows]
        batches = [Batch(t.ids_BS, t.labels_BS, t.target_BS, t.padding_BS, t.sample_B) for t in shares]
        names = ("target", "token", "sequence", "micro_batch", "multi_token")
        totals = {name: value.float() for name, value in zip(names, counts(batches), strict=True)}
        gradients = {name: torch.zeros_like(w) for name, w in masters.items()}
        loss = 0.0
        loads = [torch.zeros(case.model.moe.num_experts, dtype=torch.int64) for _ in moe_layers(model)]
        for batch in batches:
            micro_batch = MicroBatch(token_batch(batch, groups.device, seed=case.seed, step=step), totals)
            with use(micro_batch):
                nll_sum, _ = model(batch.ids_BS, batch.labels_BS, batch.target_BS)
            as_root(nll_sum / totals["target"], micro_batch).backward()
            loss += float(nll_sum.detach() / totals["target"])
            for layer, load_E in enumerate(loads):
                load_E += micro_batch.sums[layer]["load"]
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                gradients[name] += parameter.grad.float()
                parameter.grad = None
        with torch.no_grad():
            for name, parameter in parameters.items():
                masters[name] -= case.optimizer.lr * gradients[name]
                parameter.copy_(masters[name])
        for moe, load_E in zip(moe_layers(model), loads, strict=True):
            moe.router.after_step({"load": load_E})
        losses.append(loss)
        history.append({name: w.clone() for name, w in masters.items()})
    return losses, history
