"""Training steps of the real thing on every rank of a pool: what the parity tests send to the processes."""

from __future__ import annotations

import contextlib
import dataclasses
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.checkpoint.slices import cut
from moe_train.data.batches import Batch, rank_slice
from moe_train.model.language_model import LanguageModel, build_language_model
from moe_train.model.options import InitOptions, ModelOptions, MoEOptions
from moe_train.parallel.groups import Groups, make_groups
from moe_train.parallel.options import ParallelOptions
from moe_train.parallel.shard import Shard, shard_of
from moe_train.routing.balanced_gate import BalancedGate
from moe_train.routing.options import RouterOptions
from moe_train.training.engine import Engine
from moe_train.training.options import OptimizerOptions, TrainOptions
from moe_train.training.step import train_step
from tests.reference.data import Tokens, global_batch

MODEL = ModelOptions(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=100,  # padded to 128 rows
    moe=MoEOptions(num_experts=8, expert_hidden_size=32),
    init=InitOptions(std=0.08),
)
SGD = OptimizerOptions(name="sgd", lr=1.0, weight_decay=0.0)


@dataclass(frozen=True)
class Case:
    """One run of a few steps. The global batches depend on (data_seed, step) only."""

    model: ModelOptions = MODEL
    router: RouterOptions = field(default_factory=RouterOptions)
    optimizer: OptimizerOptions = SGD
    expert: int = 1
    tensor: int = 1
    zero: int = 1
    accumulation: int = 1
    recompute: bool = False
    steps: int = 3
    clip: float = 0.0
    precision: Any = "float32"
    seed: int = 1
    data_seed: int = 0
    sequences: int = 16
    length: int = 8
    padding: bool = True
    constant: bool = False
    zero_gate: bool = False
    """Start with gate weights of zero (prototypes: all alike): every logit of every token ties exactly."""
    persistent: bool = False
    """ZeRO-3 keeps small parameters whole on every rank, as is DeepSpeed's default."""
    reuse: int | None = None
    """ZeRO-3 keeps parameters that are used again within so many elements; DeepSpeed's default is 1e9."""
    texts: bool = False
    """Sequences of several texts that do not see each other."""
    offload: bool = False
    """Masters, moments and the optimizer's step in host memory."""
    other_padding: bool = False
    """Other ids and labels where there is padding."""

    def with_(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def tokens(self, step: int) -> Tokens:
        tokens = global_batch(
            step,
            sequences=self.sequences,
            length=self.length,
            vocab=self.model.vocab_size,
            seed=self.data_seed,
            padding=self.padding,
            constant=self.constant,
            texts=self.texts,
        )
        if not self.other_padding:
            return tokens
        ids_BS, labels_BS = (torch.where(tokens.padding_BS, 99 - x, x) for x in (tokens.ids_BS, tokens.labels_BS))
        return dataclasses.replace(tokens, ids_BS=ids_BS, labels_BS=labels_BS)


@dataclass(frozen=True)
class Record:
    """What one rank knows after one step."""

    loss: float
    gradient_norm: float
    auxiliary: list[dict[str, float]]
    load_LE: Tensor
    kept_LE: Tensor
    weights: dict[str, Tensor]
    """Float32 masters as global tensors; on rank 0 only."""
    biases: list[Tensor]
    state: dict[str, Tensor]
    """Every buffer of every router after the step."""
    sums: list[dict[str, Tensor]]
    """Per MoE layer: what the step moved the state by, over all ranks and micro-batches."""
    z: list[float | None]
    """Mean of logsumexp(logits)^2 per MoE layer, measured whether or not it is a loss."""


_layouts: dict[tuple[int, int], tuple[Groups, dict[str, Any]]] = {}


def groups_of(case: Case) -> Groups:
    return groups_for(case.expert, case.tensor)


def groups_for(expert: int, tensor: int = 1) -> Groups:
    """The process groups of a layout. Each layout's are made once and put back when it is asked for again: a group of
    gloo keeps three threads that poll."""
    from megatron.core import parallel_state

    if (expert, tensor) not in _layouts:
        options = ParallelOptions(expert=expert, tensor=tensor, timeout_seconds=300)
        groups = make_groups(options, torch.device("cpu"))
        made = {name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name.isupper()}
        _layouts[expert, tensor] = groups, made
    groups, made = _layouts[expert, tensor]
    vars(parallel_state).update(made)
    return groups


def micro_batches_of(case: Case, groups: Groups, step: int) -> list[Batch]:
    """This rank's share of the step's tokens."""
    size = case.sequences // groups.data_size // case.accumulation
    everything = case.tokens(step)
    batches = []
    for index in range(case.accumulation):
        start = rank_slice(0, index, groups.data_rank, groups.data_size, size)
        t = everything.rows(slice(start, start + size))
        batches.append(Batch(t.ids_BS, t.labels_BS, t.target_BS, t.padding_BS, t.sample_B, position_BS=t.position_BS))
    return batches


def build_model(case: Case) -> LanguageModel:
    model = build_language_model(
        case.model, case.router, sequence_length=case.length, seed=case.seed, recompute=case.recompute
    )
    if case.zero_gate:
        for name, parameter in model.named_parameters():
            if name.endswith("router.gate.weight"):
                torch.nn.init.zeros_(parameter)
            elif name.endswith("router.gate.prototypes"):
                with torch.no_grad():
                    parameter.copy_(parameter[:1].clone().expand_as(parameter))
    return model


def make_engine(case: Case, groups: Groups) -> Engine:
    train = TrainOptions(
        global_batch_size=case.sequences,
        micro_batch_size=case.sequences // groups.data_size // case.accumulation,
        precision=case.precision,
        zero_stage=case.zero,  # type: ignore[arg-type]
        gradient_clipping=case.clip,
        recompute=case.recompute,
        offload_optimizer="cpu" if case.offload else "none",
    )
    # Tiny tensors would otherwise stay whole on every rank, and nothing would be partitioned.
    keys: dict[str, Any] = {}
    if case.zero == 3 and not case.persistent:
        keys["stage3_param_persistence_threshold"] = 0
    if case.reuse is not None:
        keys |= {"stage3_max_reuse_distance": case.reuse, "stage3_prefetch_bucket_size": 0}
    return Engine(build_model(case), groups, train, case.optimizer, {"zero_optimization": keys} if keys else {})


def router_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of what moves by rule, by name."""
    return {name: b.clone() for name, b in module.named_buffers() if ".router." in name}


@contextlib.contextmanager
def sums_of_step() -> Iterator[list[dict[str, Tensor]]]:
    """What each MoE layer's ``after_step`` is given, in order."""
    given: list[dict[str, Tensor]] = []
    after_step = BalancedGate.after_step

    def keep(gate: BalancedGate, sums: dict[str, Tensor]) -> None:
        given.append({name: value.clone() for name, value in sums.items()})
        after_step(gate, sums)

    with unittest.mock.patch.object(BalancedGate, "after_step", keep):
        yield given


def one_step(engine: Engine, case: Case, step: int) -> Record:
    with sums_of_step() as sums:
        result = train_step(
            engine, micro_batches_of(case, engine.groups, step), lr=case.optimizer.lr, seed=case.seed, step=step
        )
    return Record(
        loss=result.loss_sum / result.loss_count,
        gradient_norm=engine.gradient_norm(),
        auxiliary=[{name: total / count for name, (total, count) in layer.items()} for layer in result.losses],
        load_LE=result.load_LE,
        kept_LE=result.kept_LE,
        weights=global_tensors(engine),
        biases=[b.clone() for n, b in engine.module.named_buffers() if n.endswith("bias_E")],
        state=router_state(engine.module),
        sums=sums,
        z=result.z,
    )


def global_tensors(engine: Engine, kind: str = "model") -> dict[str, Tensor]:
    """The masters (or ``exp_avg``, ``exp_avg_sq``) of all ranks put together, on rank 0; elsewhere empty.

    Also checks, on every rank, that each element is owned, and that the module's own parameters equal the masters.
    """
    owned = [s for s in engine.owned_slices() if s.key.startswith(kind + ".")]
    mine = [(b.key, b.shape, b.offsets, b.data.clone()) for s in owned for b in cut(s)]
    every: list[Any] = [None] * engine.groups.world_size
    dist.all_gather_object(every, mine)
    whole: dict[str, Tensor] = {}
    for key, shape, offsets, data in (part for parts in every for part in parts):
        known = whole.setdefault(key.removeprefix(kind + "."), torch.full(shape, float("nan")))
        for dim, (offset, size) in enumerate(zip(offsets, data.shape, strict=True)):
            known = known.narrow(dim, offset, size)
        # Replicas of an element must be equal, not merely close.
        assert torch.equal(torch.where(known.isnan(), data, known), data), f"{key}: owners disagree"
        known.copy_(data)
    assert not any(w.isnan().any() for w in whole.values()), "some element is owned by nobody, or not finite"
    if kind == "model":
        _compare_module(engine, whole)
    return whole if engine.groups.rank == 0 else {}


def _compare_module(engine: Engine, whole: dict[str, Tensor]) -> None:
    with engine.whole_parameters():
        named = dict(engine.module.named_parameters())
        assert named.keys() == whole.keys()
        for name, parameter in named.items():
            expected = local_part(whole[name], parameter, engine.groups).to(parameter.dtype)
            assert torch.equal(parameter.detach(), expected), f"{name}: the module does not hold what the master says"


def local_part(whole: Tensor, parameter: Tensor, groups: Groups) -> Tensor:
    """This rank's experts, or its part of a divided matrix, of a global tensor; other tensors as they are."""
    if (shard := shard_of(parameter)) is not None:
        return shard.take(whole)
    if getattr(parameter, "allreduce", True):
        return whole
    first = groups.expert_rank * parameter.shape[0]
    return whole[first : first + parameter.shape[0]]


def train(case: Case) -> list[Record]:
    """Runs the case on this rank."""
    engine = make_engine(case, groups_of(case))
    try:
        return [one_step(engine, case, step) for step in range(case.steps)]
    finally:
        engine.close()


def initial_weights(case: Case) -> dict[str, Tensor]:
    """Global tensors of a fresh model, put together from the experts of all ranks; on rank 0 only."""
    groups = groups_of(case)
    weights = {}
    for name, parameter in build_model(case).named_parameters():
        weights[name] = parameter.detach().clone()
        if (shard := shard_of(parameter)) is not None:
            weights[name] = joined(parameter, shard, groups)
        elif not getattr(parameter, "allreduce", True):
            parts = [torch.empty_like(parameter) for _ in range(groups.expert_size)]
            dist.all_gather(parts, parameter.detach().clone(), group=groups.expert)
            weights[name] = torch.cat(parts)
    return weights if groups.rank == 0 else {}


def joined(parameter: Tensor, shard: Shard, groups: Groups) -> Tensor:
    """The global tensor of a divided one."""
    every: list[Any] = [None] * groups.tensor_size
    dist.all_gather_object(every, (shard, parameter.detach().clone()), group=groups.tensor)
    whole = torch.full(shard.shape, float("nan"), dtype=parameter.dtype)
    for other, local in every:
        sizes = [size for _, size in other.pieces]
        for (first, size), piece in zip(other.pieces, local.split(sizes, other.dim), strict=True):
            whole.narrow(other.dim, first, size).copy_(piece)
    return whole
