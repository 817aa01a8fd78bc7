"""The reference's answer to a case, and the comparison."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from moe_train.model.options import ModelOptions
from moe_train.routing.options import RouterOptions
from moe_train.routing.schedule import Ramp
from tests.distributed.harness import training
from tests.distributed.harness.pool import ProcessPool
from tests.distributed.harness.training import Case, Record
from tests.reference.data import micro_batches
from tests.reference.geometry import Geometry, Latent, Router, Scaling
from tests.reference.training import Optimizer, Step, run

Processes = Callable[[int], ProcessPool]

SMALLEST_MARGIN = 1e-5
"""Selections nearer to a tie than this could differ by rounding alone (logits are of order 1)."""


def geometry_of(model: ModelOptions) -> Geometry:
    norms = {"qwen3_moe": "head", "qwen3": "head", "olmoe": "all"}
    scaling, latent, dense = model.rope_scaling, model.latent_attention, set(model.dense_layers)
    if model.family in ("qwen3", "llama3"):
        dense = set(range(model.num_layers))
    return Geometry(
        query_key_norm=norms.get(model.family, "none"),
        clip=model.clip_qkv,
        scaling=scaling
        and Scaling(
            kind=scaling.kind,
            factor=scaling.factor,
            original_length=scaling.original_length,
            low=scaling.low_frequency_factor,
            high=scaling.high_frequency_factor,
            beta_fast=scaling.beta_fast,
            beta_slow=scaling.beta_slow,
            truncate=scaling.truncate,
            attention_factor=scaling.attention_factor,
            mscale=scaling.mscale,
            mscale_all_dim=scaling.mscale_all_dim,
        ),
        latent=latent
        and Latent(
            query_rank=latent.query_rank,
            rank=latent.key_value_rank,
            nope=latent.nope_head_dim,
            rope=latent.rope_head_dim,
            value=latent.value_head_dim,
            interleaved=latent.interleaved,
        ),
        moe_layers=tuple(layer for layer in range(model.num_layers) if layer not in dense),
        multi_token=model.multi_token.coefficient if model.multi_token.layers else None,
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim or model.hidden_size // model.num_attention_heads,
        vocab=model.vocab_size,
        experts=model.moe.num_experts,
        shared=model.moe.shared_expert_hidden_size is not None,
        tied=model.tie_embeddings,
        rope_theta=model.rope_theta,
        norm_eps=model.norm_eps,
    )


def router_of(router: RouterOptions, step: int = 0) -> Router:
    """In this step, from 0."""
    balancing, capacity = router.balancing, router.capacity
    return Router(
        gate=router.gate,
        options=router.options,
        switch=coefficient(balancing.switch_loss.coefficient, step),
        switch_scope=balancing.switch_loss.scope,
        z=coefficient(balancing.z_loss, step),
        bias_rate=balancing.bias.rate,
        bias_rule=balancing.bias.rule,
        bias_target=balancing.bias.target_load,
        importance=coefficient(balancing.importance_loss.coefficient, step),
        importance_scope=balancing.importance_loss.scope,
        importance_of=balancing.importance_loss.of,
        capacity=capacity.factor,
        drop=capacity.drop,
        minimum=capacity.minimum,
    )


def coefficient(value: float | Ramp, step: int) -> float | None:
    """Of a loss in this step, None for one that is off; ramps of the tests are straight."""
    if not isinstance(value, Ramp):
        return value or None
    assert value.shape == "linear"
    return value.start + (value.end - value.start) * min(1.0, max(0.0, (step - value.first_step) / value.steps))


class _Keyed:
    """A case and its initial weights, as a key of the cache by what the reference's answer depends on."""

    def __init__(self, processes: Processes, case: Case, micro_size: int | None) -> None:
        self.processes, self.case, self.micro_size = processes, case, micro_size
        self.key = repr((case.with_(expert=1, tensor=1, zero=1, accumulation=1, recompute=False), micro_size))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self.key == other.key


def expected(processes: Processes, case: Case, micro_size: int | None = None) -> list[Step]:
    """The reference's steps from the same initial weights, in float64. ``micro_size``: sequences per micro-batch, for
    losses of that scope."""
    return _steps(_Keyed(processes, case, micro_size))


def away_from_ties(processes: Processes, case: Case, micro_size: int | None = None) -> Case:
    """The case with the first seed of its data where no selection is a near-tie in the reference."""
    for seed in range(20):
        seeded = case.with_(data_seed=seed)
        if min(step.margin for step in expected(processes, seeded, micro_size)) > SMALLEST_MARGIN:
            return seeded
    raise AssertionError("every seed has a near-tie: use fewer tokens or larger initial weights")


def initial_weights(processes: Processes, case: Case) -> dict[str, Tensor]:
    """Global tensors of a fresh model, from one process."""
    return _initial(_Keyed(processes, case.with_(data_seed=0, steps=0), None))


@functools.lru_cache(maxsize=64)
def _initial(keyed: _Keyed) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = keyed.processes(1).run(
        training.initial_weights, case=keyed.case.with_(expert=1, tensor=1)
    )[0]
    return weights


@functools.lru_cache(maxsize=256)
def _steps(keyed: _Keyed) -> list[Step]:
    case = keyed.case
    optimizer = Optimizer(
        name=case.optimizer.name,
        lr=case.optimizer.lr,
        clip=case.clip,
        betas=case.optimizer.betas,
        eps=case.optimizer.eps,
        weight_decay=case.optimizer.weight_decay,
    )
    return run(
        geometry_of(case.model),
        [router_of(case.router, step) for step in range(case.steps)],
        initial_weights(keyed.processes, case),
        [case.tokens(step) for step in range(case.steps)],
        optimizer,
        micro_batches=None if keyed.micro_size is None else micro_batches(case.sequences, keyed.micro_size),
    )


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest element."""
    difference = float((got.double() - want.double()).abs().max())
    return difference / max(float(want.double().abs().max()), 1e-30)


def weight_errors(got: dict[str, Tensor], want: dict[str, Tensor], started: dict[str, Tensor]) -> dict[str, float]:
    """Per parameter: ``relative``, in units of what is allowed.

    1e-6 where the parameter has weights. One that started at zero consists of gradients alone: 4e-6, which is what
    float32 leaves of a sum over all tokens whose terms nearly cancel.
    """
    assert got.keys() == want.keys()
    allowed = {name: 1e-6 if started[name].any() else 4e-6 for name in want}
    return {name: relative(got[name], want[name]) / allowed[name] for name in want}


def check(processes: Processes, case: Case, records: list[list[Record]], micro_size: int | None = None) -> None:
    """Every step of every rank against the reference: weights (hence gradients), loss, norm, auxiliary losses, loads
    and selection bias."""
    want = expected(processes, case, micro_size)
    started = initial_weights(processes, case)
    for number, step in enumerate(want):
        for rank, record in enumerate(ranks[number] for ranks in records):
            where = f"step {number}, rank {rank}"
            assert abs(record.loss - step.loss) <= 1e-6 * step.loss, f"{where}: loss {record.loss}, not {step.loss}"
            assert abs(record.gradient_norm - step.gradient_norm) <= 1e-6 * step.gradient_norm, (
                f"{where}: gradient norm {record.gradient_norm}, not {step.gradient_norm}"
            )
            assert torch.equal(record.load_LE, step.load_LE), f"{where}: loads differ"
            assert torch.equal(record.kept_LE, step.kept_LE), f"{where}: other tokens are dropped"
            for layer, losses in enumerate(step.auxiliary):
                assert record.auxiliary[layer].keys() == losses.keys(), where
                for name, value in losses.items():
                    got = record.auxiliary[layer][name]
                    assert abs(got - value) <= 2e-6 * abs(value), f"{where}, layer {layer}: {name} {got}, not {value}"
            for layer, bias_E in enumerate(record.biases):
                assert torch.equal(bias_E, step.biases_LE[layer]), f"{where}: bias of layer {layer} differs"
        errors = weight_errors(records[0][number].weights, step.weights, started)
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= 1, f"step {number}: {worst} is off by {errors[worst]:.2f} times what is allowed"
