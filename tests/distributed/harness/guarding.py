"""Steps with bad numbers, and replicas that differ, on every rank of a pool."""

from __future__ import annotations

import contextlib
import errno
import unittest.mock
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from moe_train.training import trainer, validation
from moe_train.training.engine import Engine
from moe_train.training.guard.explain import Place, place_of
from moe_train.training.guard.policy import Policy
from moe_train.training.guard.replicas import differences
from moe_train.training.guard.watch import Watch
from moe_train.training.options import GuardOptions
from moe_train.training.run_config import load_run_config
from moe_train.training.step import Measured, StepResult, train_step
from moe_train.training.stop import StopRequest
from moe_train.training.validation import forward_function
from tests.distributed.harness.checkpointing import Snapshot, snapshot
from tests.distributed.harness.training import Case, groups_for, groups_of, make_engine, micro_batches_of


class BadGradient:
    """Makes one rank's gradient of the final norm infinite, or its loss NaN, while it is on."""

    def __init__(self, engine: Engine, rank: int, what: str = "gradient") -> None:
        self.on = False
        if engine.groups.rank == rank and what == "loss":
            engine.module.register_forward_hook(
                lambda module, args, output: (output[0] * float("nan"), *output[1:]) if self.on else output
            )
        elif engine.groups.rank == rank:
            named = engine.module.named_parameters()
            parameter = next(p for name, p in named if name.endswith("final_layernorm.weight"))
            parameter.register_hook(lambda gradient: gradient + float("inf") if self.on else gradient)


@dataclass(frozen=True)
class Skipped:
    before: Snapshot
    after: Snapshot
    """The refused step."""
    end: Snapshot
    """After one more step."""
    taken: list[bool]
    place: Place
    """What the explanation names."""
    norms: list[float]


def skip_a_step(case: Case, bad: int | None, rank: int = 0, what: str = "gradient") -> Skipped:
    """Three steps; the one with number ``bad`` (from 0) has an infinite gradient or a loss of NaN on one rank, or a
    loss that the judge takes for a spike. Without ``bad`` the second step's data is not trained on at all."""
    engine = make_engine(case, groups_of(case))
    gradient = BadGradient(engine, rank, what)
    policy = Policy(GuardOptions(spike="skip", window=2))
    place = Place()
    taken: list[bool] = []
    norms: list[float] = []

    def judge(measured: Measured) -> bool:
        nonlocal place
        loss = measured.loss
        if step == bad and what == "spike":
            policy.losses.values.extend([loss / 3, loss / 3.1])
        verdict = policy.judge(loss, finite=measured.finite, rewinds=0)
        if what == "spike":
            policy.losses.values.clear()
        if verdict.action == "skip":
            place = place_of(engine, float(measured.own_loss))
        return verdict.action == "take"

    shots = []
    for step in range(3):
        gradient.on = step == bad and what != "spike"
        if bad is None and step == 1:
            continue
        shots.append(snapshot(engine, []))
        batches = micro_batches_of(case, engine.groups, step)
        result = train_step(engine, batches, lr=case.optimizer.lr, seed=case.seed, step=step, judge=judge)
        taken.append(result.taken)
        norms.append(engine.gradient_norm())
    shots.append(snapshot(engine, []))
    engine.close()
    return Skipped(shots[1], shots[-2], shots[-1], taken, place, norms)


def flip_a_bit(case: Case, rank: int, where: str) -> tuple[list[Any], list[Any], list[Any]]:
    """What a comparison finds before anything is wrong, after one rank's tensor ``where`` has another bit, and after
    the counters differ: (name, ranks)."""
    engine = make_engine(case, groups_of(case))
    batches = micro_batches_of(case, engine.groups, 0)
    train_step(engine, batches, lr=case.optimizer.lr, seed=case.seed, step=0)
    found = [differences(engine, "step 1")]
    if engine.groups.rank == rank:
        named = dict(engine.module.named_parameters()) | dict(engine.module.named_buffers())
        tensor = next(t for name, t in named.items() if name.endswith(where))
        element = tensor.data.view(-1)[-1:]
        bits = element.view(torch.int16 if element.element_size() == 2 else torch.int32)
        bits ^= 1
    found.append(differences(engine, "step 1"))
    if engine.groups.rank == rank:
        bits ^= 1
    found.append(differences(engine, f"step {1 + (engine.groups.rank == rank)}"))
    engine.close()
    first, second, third = ([(d.name, d.ranks) for d in part] for part in found)
    return first, second, third


@dataclass(frozen=True)
class Trouble:
    """What happens in a run, by the number of the step (from 1) that is about to be taken."""

    bad: Sequence[int] = ()
    """One rank's gradient is infinite."""
    corrupt: int = 0
    """A bit of one rank's gate state flips after this step. (Parameters are copied from the masters in each step.)"""
    die: int = 0
    """The process ends without another word."""
    stop: int = 0
    """The process is told to stop."""
    full_disk_from: int = 0
    """Nothing can be written into the run's folder any more..."""
    full_disk_until: int = 0
    """...before this step."""
    room_for_records: bool = False
    """Then only tensors find no place."""
    in_validation: Literal["", "die", "stop"] = ""
    """The same in the second batch of the first validation; only one rank is told to stop."""
    left_out: Sequence[int] = ()
    """The run never sees the data of these steps."""
    rank: int = 1


@contextlib.contextmanager
def full_disk(room_for_records: bool) -> Iterator[None]:
    """Under checkpoints, or under records and the small files beside them as well."""
    no_space = OSError(errno.ENOSPC, "No space left on device")
    with contextlib.ExitStack() as patches:
        records = ("moe_train.training.callbacks.appended.Appended.append", "pathlib.Path.write_bytes")
        for name in ("moe_train.checkpoint.writing._Stream.write", *(records if not room_for_records else ())):
            patches.enter_context(unittest.mock.patch(name, side_effect=no_space))
        yield


def whole_run(run_dir: str, overrides: Sequence[str], trouble: Trouble, resume: str | None = None) -> str:
    """A run of the tiny experiment through the trainer itself; the class and text of what it raised."""
    config = load_run_config("tiny", overrides)
    stop = StopRequest()
    gradient: BadGradient | None = None
    mine = dist.get_rank() == trouble.rank % dist.get_world_size()

    def step_with_trouble(engine: Engine, *args: Any, step: int, **kwargs: Any) -> StepResult:
        nonlocal gradient
        gradient = gradient or BadGradient(engine, trouble.rank % dist.get_world_size())
        gradient.on = step + 1 in trouble.bad
        if step + 1 == trouble.die:
            raise InterruptedError("died")
        if step + 1 == trouble.stop:
            stop.signal = 15
        if step + 1 == trouble.full_disk_from:
            disk.enter_context(full_disk(trouble.room_for_records))
        if step + 1 == trouble.full_disk_until:
            disk.close()
        result = train_step(engine, *args, step=step, **kwargs)
        if step + 1 == trouble.corrupt and mine:
            bias_E = next(b for n, b in engine.module.named_buffers() if n.endswith("bias_E"))
            bias_E.view(torch.int32)[0] ^= 1
        return result

    validated = 0

    def forward_with_trouble(model: Any, groups: Any) -> Any:
        forward = forward_function(model, groups)

        def watched(batch: Any) -> Any:
            nonlocal validated
            validated += 1
            if validated == 2 and trouble.in_validation == "die":
                raise InterruptedError("died")
            if validated == 2 and mine and trouble.in_validation == "stop":
                stop.signal = 15
            return forward(batch)

        return watched

    leaves_out = Watch.leaves_out
    disk = contextlib.ExitStack()
    patches: list[Any] = [
        unittest.mock.patch.object(trainer, "train_step", step_with_trouble),
        unittest.mock.patch.object(validation, "forward_function", forward_with_trouble),
        unittest.mock.patch.object(trainer, "initialize", lambda options: groups_for(options.expert)),
    ]
    if trouble.left_out:
        never = unittest.mock.patch.object(Watch, "leaves_out", lambda self, step: step in trouble.left_out)
        patches.append(never)
    for patch in patches:
        patch.start()
    try:
        trainer.train(config, Path(run_dir), resume, stop)
        return ""
    except (RuntimeError, FloatingPointError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for patch in patches:
            patch.stop()
        disk.close()
        assert Watch.leaves_out is leaves_out


def run_of_rank_0(run_dir: str, overrides: Sequence[str]) -> str:
    """Likewise, where only rank 0 knows that the run goes on, as after a restart that the others took no part in."""
    return whole_run(run_dir, overrides, Trouble(), resume="auto" if dist.get_rank() == 0 else None)
