"""One optimizer step: micro-batches forward and backward, exact normalisation, statistics, gate state.

Suffixes: S sequence, B batch, T = S * B tokens, L MoE layers in order, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_train.data.batches import Batch
from moe_train.model.micro_batch import MicroBatch, as_root, use
from moe_train.model.moe_layer import moe_layers
from moe_train.model.multi_token import UNIT as MULTI_TOKEN
from moe_train.model.multi_token import multi_token_targets
from moe_train.model.texts import Texts, texts_of
from moe_train.routing.interface import TokenBatch
from moe_train.training.collected import Collector
from moe_train.training.engine import Engine
from moe_train.training.window import Window

_COUNTS = ("target", "token", "sequence", "micro_batch", MULTI_TOKEN)


@dataclass(frozen=True)
class Requests:
    """What a rank wants to happen after this step; it happens when any rank wants it."""

    stop: bool = False
    save: bool = False


NO_REQUESTS = Requests()


@dataclass(frozen=True)
class Measured:
    """What is known of a step before the optimizer moves; the same on every rank but for ``own_loss``."""

    loss: float
    """Mean over all target tokens."""
    finite: bool
    """Whether the norm of the gradients is."""
    own_loss: Tensor
    """Sum over this rank's target tokens, on the device."""


def refuse_bad_numbers(measured: Measured) -> bool:
    """The judge of steps where nobody else is: FloatingPointError, on every rank, where loss or gradients are not
    finite."""
    if not math.isfinite(measured.loss):
        raise FloatingPointError(f"the loss is {measured.loss}")
    if not measured.finite:
        raise FloatingPointError("a gradient is not finite")
    return True


@dataclass(frozen=True)
class StepResult:
    """Sums of one optimizer step over all ranks and micro-batches."""

    loss_sum: float
    loss_count: int
    tokens: int
    layers: list[int]
    """Numbers of the MoE layers, from 0; empty where none has experts."""
    load_LE: Tensor
    kept_LE: Tensor
    losses: list[dict[str, tuple[float, float]]]
    """Per MoE layer: name of the auxiliary loss -> (sum, count), without coefficient."""
    z: list[float | None]
    """Per MoE layer: mean of logsumexp(logits)^2 over tokens, also without a z-loss; None where the gate has no such
    logits."""
    requests: Requests
    """Of all ranks together."""
    k_histogram_LN: Tensor | None = None
    """int64, tokens by their number of experts, N = E + 1; None where the gate gives all the same number."""
    taken: bool = True
    """False where the step was refused: nothing has moved, and the sums may hold anything."""


def left_out_step() -> StepResult:
    """Of a step whose data is neither read nor trained on."""
    none = torch.zeros(0, 0, dtype=torch.int64)
    return StepResult(math.nan, 0, 0, [], none, none, [], [], NO_REQUESTS, taken=False)


def token_batch(
    batch: Batch, device: torch.device, *, seed: int = 0, step: int = 0, window_sum: Any = None
) -> TokenBatch:
    """The micro-batch as gates see it: tokens flattened [S, B] -> T."""
    batch_size, sequence_length = batch.ids_BS.shape
    position_S = torch.arange(sequence_length)
    return TokenBatch(
        ids_T=batch.ids_BS.t().reshape(-1).to(device),
        sample_T=batch.sample_B.expand(sequence_length, batch_size).reshape(-1).to(device),
        position_T=position_S[:, None].expand(sequence_length, batch_size).reshape(-1).to(device),
        padding_T=batch.padding_BS.t().reshape(-1).to(device),
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        step=step,
        window_sum=window_sum,
    )


def batch_texts(batch: Batch, device: torch.device) -> Texts | None:
    """The texts that do not see each other, None where each sequence is one."""
    return None if batch.position_BS is None else texts_of(batch.position_BS, device)


def counts(batches: list[Batch]) -> Tensor:
    """float64 [target tokens, tokens, sequences and micro-batches that hold a token, targets of multi-token prediction]
    of this rank."""
    values = torch.zeros(len(_COUNTS), dtype=torch.float64)
    for batch in batches:
        real_BS = ~batch.padding_BS
        sequences = real_BS.any(dim=1).sum()
        further = multi_token_targets(batch.target_BS, batch.position_BS).sum()
        values += torch.stack([batch.target_BS.sum(), real_BS.sum(), sequences, (sequences > 0).long(), further])
    return values


def train_step(
    engine: Engine,
    batches: list[Batch],
    *,
    lr: float,
    seed: int,
    step: int,
    requests: Requests = NO_REQUESTS,
    judge: Callable[[Measured], bool] = refuse_bad_numbers,
) -> StepResult:
    """Runs the micro-batches of this rank and moves the optimizer and the gates' state once, if ``judge`` says so: it
    is asked on every rank, before anything moves, and must answer alike.

    The language loss is the sum over all target tokens of the step divided by their number, over all ranks and
    micro-batches; auxiliary losses likewise from their (sum, count) pairs, in the same backward pass.

    ValueError, on every rank, where no token of the step is a target; and whatever ``judge`` raises.
    """
    groups, device = engine.groups, engine.groups.device
    assert len(batches) == engine.accumulation
    wanted = groups.sum_over_tensor(torch.tensor([requests.stop, requests.save], dtype=torch.float64, device=device))
    total = groups.sum_over_data(torch.cat([counts(batches).to(device), wanted]))
    counted = total.tolist()
    if not counted[0]:
        raise ValueError(
            f"step {step + 1} has no token that counts in the loss: is every prompt longer than data.sequence_length?"
        )
    totals = {name: total[i].clamp(min=1).float() for i, name in enumerate(_COUNTS)}
    engine.set_lr(lr)
    engine.set_training(True)
    layers = moe_layers(engine.module)
    window = Window(groups)
    if engine.accumulation > 1 and any(layer.router.options.balancing.exact for layer in layers):
        _measure(engine, batches, window, totals, seed=seed, step=step)
    collected = Collector([layer.layer for layer in layers])
    for number, batch in enumerate(batches, start=1):
        tokens = token_batch(batch, device, seed=seed, step=step, window_sum=window.for_micro_batch())
        micro_batch = MicroBatch(tokens=tokens, totals=totals, texts=batch_texts(batch, device))
        with use(micro_batch):
            nll_sum, _ = engine(batch.ids_BS.to(device), batch.labels_BS.to(device), batch.target_BS.to(device))
        loss = as_root(nll_sum / totals["target"], micro_batch)
        engine.backward(loss * engine.loss_factor)
        collected.add(nll_sum.detach(), micro_batch)
        if number < len(batches):
            engine.next_micro_batch()
    collected.gradient_norm = engine.measure_gradients()
    sums, losses, loss_sum = collected.reduce(groups)
    own_loss = torch.as_tensor(collected.nll_sum)
    taken = judge(Measured(loss=loss_sum / counted[0], finite=collected.finite, own_loss=own_loss))
    if taken:
        engine.step()
        for layer, layer_sums in zip(layers, sums, strict=True):
            layer.router.after_step(layer_sums)
    else:
        engine.discard_step()
    empty = torch.zeros(0, 0, dtype=torch.int64)
    return StepResult(
        loss_sum=loss_sum,
        loss_count=int(counted[0]),
        tokens=int(counted[1]),
        layers=collected.layers,
        load_LE=torch.stack([s["load"] for s in sums]).cpu() if sums else empty,
        kept_LE=torch.stack([s["kept"] for s in sums]).cpu() if sums else empty,
        losses=losses,
        z=_means_of_z(sums),
        requests=Requests(*(x > 0 for x in counted[len(_COUNTS) :])),
        k_histogram_LN=_k_histograms(sums),
        taken=taken,
    )


@torch.no_grad()
def _measure(
    engine: Engine, batches: list[Batch], window: Window, totals: dict[str, Tensor], *, seed: int, step: int
) -> None:
    """A forward pass over all micro-batches, for the sums of the whole step at global scope. It moves nothing: gates
    are pure, noise is counter-based, and nothing is collected."""
    device, module = engine.groups.device, engine.module
    for batch in batches:
        tokens = token_batch(batch, device, seed=seed, step=step, window_sum=window.for_measuring())
        micro_batch = MicroBatch(tokens=tokens, totals=totals, texts=batch_texts(batch, device))
        with use(micro_batch):
            if module.mtp is None:
                # The logits of one position: the head has no gate.
                micro_batch.predict_B = torch.zeros(batch.ids_BS.shape[0], dtype=torch.int64, device=device)
                engine(batch.ids_BS.to(device))
            else:
                engine(batch.ids_BS.to(device), batch.labels_BS.to(device), batch.target_BS.to(device))
    window.close_measuring()


def _means_of_z(sums: list[dict[str, Tensor]]) -> list[float | None]:
    """Of each layer; all of them have the same gate. Read from the device at once."""
    if not all("z" in s for s in sums):
        return [None] * len(sums)
    return torch.stack([s["z"] / s["tokens"].clamp(min=1) for s in sums]).tolist() if sums else []


def _k_histograms(sums: list[dict[str, Tensor]]) -> Tensor | None:
    """Of all layers, which have the same gate."""
    found = [s["k_histogram"] for s in sums if "k_histogram" in s]
    return torch.stack(found).cpu() if found else None
