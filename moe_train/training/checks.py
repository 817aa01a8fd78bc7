"""What no single section can know: whether the sections of a configuration fit each other and the processes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.config.errors import Problem
from moe_train.data.options import Blend, label_of, members_of
from moe_train.model.families import family_of
from moe_train.training.deepspeed_keys import clashes
from moe_train.training.guard.checks import guard_problems
from moe_train.training.model_checks import model_problems
from moe_train.training.tensor_checks import tensor_problems

if TYPE_CHECKING:
    from moe_train.training.run_config import RunConfig


def problems(config: RunConfig, world_size: int | None = None) -> list[Problem]:
    """Everything wrong with a configuration; without ``world_size`` what holds for any number of processes."""
    found = [
        *_values(config),
        *_data(config),
        *model_problems(config),
        *_causal_exceptions(config),
        *_routing(config),
        *_unsupported(config),
        *guard_problems(config.guard, config.checkpoint),
        *clashes(config.deepspeed),
    ]
    found += _layout(config)
    if not found:
        found += tensor_problems(config)
    if world_size is not None and not found:
        found += _processes(config, world_size)
    return found


def _values(config: RunConfig) -> Iterator[Problem]:
    """Ranges of single values that the types do not express."""
    train, optimizer, schedule = config.train, config.optimizer, config.schedule
    positive = {
        "train.steps": train.steps,
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "data.sequence_length": config.data.sequence_length,
        "optimizer.eps": optimizer.eps,
        "logging.every": config.logging.every,
        "alarm.window": config.alarm.window,
        "alarm.min_slots": config.alarm.min_slots,
        "alarm.z_steps": config.alarm.z_steps,
        "checkpoint.keep": config.checkpoint.keep,
        "parallel.timeout_seconds": config.parallel.timeout_seconds,
    }
    for parallel in ("expert", "tensor", "pipeline", "context"):
        positive[f"parallel.{parallel}"] = getattr(config.parallel, parallel)
    if config.eval.every:
        positive["eval.steps"] = config.eval.steps
        if not config.data.validation:
            yield Problem("eval.every", "needs a validation set: give data.validation a name, or set eval.every to 0")
    if config.checkpoint.best and not config.eval.every:
        yield Problem("checkpoint.best", "needs validation losses: set eval.every")
    if config.profile.start_step:
        positive["profile.steps"] = config.profile.steps
    for path, value in positive.items():
        if not value > 0:
            yield Problem(path, f"must be greater than 0, got {value}")
    not_negative = {
        "seed": config.seed,
        "train.gradient_clipping": train.gradient_clipping,
        "optimizer.lr": optimizer.lr,
        "optimizer.weight_decay": optimizer.weight_decay,
        "optimizer.gate_lr_factor": optimizer.gate_lr_factor,
        "schedule.warmup_steps": schedule.warmup_steps,
        "eval.every": config.eval.every,
        "alarm.quiet_steps": config.alarm.quiet_steps,
        "logging.max_layer_tags": config.logging.max_layer_tags,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.every_minutes": config.checkpoint.every_minutes,
        "checkpoint.keep_every_steps": config.checkpoint.keep_every_steps,
        "checkpoint.keep_every_hours": config.checkpoint.keep_every_hours,
        "profile.start_step": config.profile.start_step,
    }
    for path, value in not_negative.items():
        if not 0 <= value < math.inf:
            yield Problem(path, f"must be a number of at least 0, got {value}")
    for path, fraction in (
        ("schedule.decay_fraction", schedule.decay_fraction),
        ("schedule.final_lr_fraction", schedule.final_lr_fraction),
        ("alarm.load_share", config.alarm.load_share),
        ("alarm.entropy", config.alarm.entropy),
    ):
        if not 0 <= fraction <= 1:
            yield Problem(path, f"must lie between 0 and 1, got {fraction}")
    if config.alarm.z_growth and not 1 < config.alarm.z_growth < math.inf:
        yield Problem("alarm.z_growth", f"must be greater than 1, or 0 for no alarm, got {config.alarm.z_growth}")
    for index, beta in enumerate(optimizer.betas):
        if not 0 <= beta < 1:
            yield Problem(f"optimizer.betas.{index}", f"must be at least 0 and below 1, got {beta}")
    if schedule.warmup_steps > train.steps:
        yield Problem("schedule.warmup_steps", f"{schedule.warmup_steps} is more than train.steps ({train.steps})")
    if not config.name or config.name != config.name.strip() or any(c in config.name for c in "/\\\0"):
        yield Problem("name", f"{config.name!r} cannot name a folder")


def _data(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    blends = [("data.train", data.train), ("data.validation", data.validation)]
    blends += [(f"data.stages.{number}.train", stage.train) for number, stage in enumerate(data.stages)]
    for path, blend in blends:
        yield from _blend(path, blend, required=path.startswith("data.stages"))
    before = 0
    for number, stage in enumerate(data.stages):
        if stage.from_step <= before:
            what = f"the stage before begins at step {before}" if number else "data.train is what step 0 reads"
            yield Problem(
                f"data.stages.{number}.from_step", f"must be greater than {before} ({what}), got {stage.from_step}"
            )
        before = max(before, stage.from_step)
        if stage.from_step >= config.train.steps:
            yield Problem(
                f"data.stages.{number}.from_step",
                f"the stage {label_of(stage.train)} would begin after {stage.from_step} steps, but train.steps is "
                f"{config.train.steps}: it would never be read; let it begin earlier, or leave it out",
            )
    if data.reset_at_documents and data.sampler != "packed":
        yield Problem(
            "data.reset_at_documents", "belongs to data.sampler: packed; with documents no sequence crosses a boundary"
        )
    if data.pack_documents and data.sampler != "documents":
        yield Problem("data.pack_documents", "belongs to data.sampler: documents; packed fills its windows anyway")
    if data.index_cache and data.sampler != "documents":
        yield Problem("data.index_cache", "belongs to data.sampler: documents; packed has no index")


def _blend(path: str, blend: Blend, required: bool) -> Iterator[Problem]:
    members = members_of(blend)
    if not members and (required or blend != ""):
        yield Problem(path, "names no data set")
    for name, count in Counter(name for name, _ in members).items():
        if not name.strip():
            yield Problem(path, "a member has no name")
        elif count > 1:
            yield Problem(path, f"{name} stands in it {count} times; give it a larger weight instead")
    weights = [weight for _, weight in members if weight is not None]
    if weights and len(weights) < len(members):
        yield Problem(
            path, "some members have weights and some do not: write all as {path: NAME, weight: W} or all as names"
        )
    for name, weight in members:
        if weight is not None and not 0 < weight < math.inf:
            yield Problem(path, f"the weight of {name} must be a number greater than 0, got {weight}")


def _causal_exceptions(config: RunConfig) -> Iterator[Problem]:
    if not config.causal_exceptions:
        return
    from moe_train.routing import available_gates
    from moe_train.routing.strict import listing

    known = [*available_gates(), "capacity"]
    for name in config.causal_exceptions:
        if name not in known:
            yield Problem(
                "causal_exceptions",
                f"{name!r} is neither a gate nor capacity; {listing(name, known, 'known are')}",
            )


def _routing(config: RunConfig) -> Iterator[Problem]:
    from moe_train.routing import blank_gate, check_options, looks_ahead

    router, experts = config.router, config.model.moe.num_experts
    if experts < 1 or not family_of(config.model).experts:
        return
    try:
        check_options(router, experts)
    except ValueError as error:
        message = str(error)
        # A message about balancing names its own key already.
        yield Problem("" if message.startswith("router.") else "router.options", message)
        return
    gate = blank_gate(router.gate, router.options, experts)
    vocabulary = config.model.vocab_size
    if gate.vocab_size is not None and gate.vocab_size != vocabulary:
        yield Problem(
            "router.options",
            f"vocab_size is {gate.vocab_size}, but model.vocab_size is {vocabulary}, and {router.gate} needs an entry "
            f"for each token id: set router.options.vocab_size={vocabulary}",
        )
    if not gate.causal and router.gate not in config.causal_exceptions:
        yield Problem(
            "router.gate",
            f"{router.gate} lets a token's routing depend on later tokens, which a language model cannot do when it "
            f"generates; to accept that, say causal_exceptions=[{router.gate}]",
        )
    if looks_ahead(router.capacity, gate) and "capacity" not in config.causal_exceptions:
        yield Problem(
            "router.capacity",
            "lets later tokens take a token's place (drop: probability, or a gate without a bound on experts per "
            "token, whose capacity depends on what all tokens choose); take drop: position and a bound, or, to accept "
            "that, name capacity in causal_exceptions",
        )


def check_gate_files(config: RunConfig) -> None:
    """ValueError where training cannot read what the gate's initial values are made of."""
    from moe_train.routing import blank_gate

    if not family_of(config.model).experts:
        return
    gate = blank_gate(config.router.gate, config.router.options, config.model.moe.num_experts)
    for path in gate.initial_files:
        if not Path(path).is_file():
            raise ValueError(f"router.options names {path}, but there is no such file (seen from {Path.cwd()})")


def _unsupported(config: RunConfig) -> Iterator[Problem]:
    instead = "parallel.expert and ZeRO" if family_of(config.model).experts else "ZeRO"
    for name in ("pipeline", "context"):
        size = getattr(config.parallel, name)
        if size > 1:
            yield Problem(
                f"parallel.{name}",
                f"{name} parallelism is not supported yet, got {size}; use {instead}",
            )
    if config.train.offload_optimizer != "none" and config.parallel.tensor > 1:
        yield Problem(
            "train.offload_optimizer",
            f"{config.train.offload_optimizer} together with tensor parallelism is not tested; use ZeRO 2 or 3 instead",
        )


def _layout(config: RunConfig) -> Iterator[Problem]:
    model, ep = config.model, config.parallel.expert
    experts = model.moe.num_experts
    if not family_of(model).experts:
        if ep > 1:
            yield Problem("parallel.expert", f"{model.family} has no experts to spread over {ep} ranks; set it to 1")
    elif ep > 0 and experts % ep:
        yield Problem("parallel.expert", f"{experts} experts (model.moe.num_experts) cannot be spread over {ep} ranks")
    train = config.train
    if train.micro_batch_size > 0 and train.global_batch_size % train.micro_batch_size:
        yield Problem(
            "train.global_batch_size",
            f"{train.global_batch_size} is not divisible by train.micro_batch_size ({train.micro_batch_size})",
        )


def _processes(config: RunConfig, world_size: int) -> Iterator[Problem]:
    size = config.layout_size
    if world_size < 1 or world_size % size:
        yield Problem(
            "parallel.expert",
            f"{world_size} process{'es' if world_size != 1 else ''} cannot hold this layout: "
            f"the number must be a multiple of expert and of tensor, so of {size}; use --processes {size}",
        )
        return
    train, dp = config.train, config.data_parallel_size(world_size)
    if train.global_batch_size % (train.micro_batch_size * dp):
        yield Problem(
            "train.global_batch_size",
            f"{train.global_batch_size} is not divisible by train.micro_batch_size "
            f"({train.micro_batch_size}) x data-parallel ranks ({dp}) = {train.micro_batch_size * dp}",
        )
