"""The training loop of one worker."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_train.data.batches import Batch
from moe_train.data.options import all_names, names_of
from moe_train.data.steps import StepReader
from moe_train.data.training_set import open_training_set
from moe_train.model.language_model import build_language_model
from moe_train.parallel.device import memory_used
from moe_train.parallel.first_rank import from_rank_0
from moe_train.parallel.groups import Groups, initialize
from moe_train.parallel.once import once_per_node
from moe_train.training.beginning import begin
from moe_train.training.callbacks.alarms import alarms
from moe_train.training.callbacks.base import Callbacks, RunInfo, Status
from moe_train.training.callbacks.build import build_callbacks
from moe_train.training.callbacks.profiling import profile_hook
from moe_train.training.checkpoints import Checkpoints, check_disk
from moe_train.training.checks import check_gate_files
from moe_train.training.engine import Engine
from moe_train.training.facts import device_facts, write_facts
from moe_train.training.going_back import going_back
from moe_train.training.guard.watch import Watch
from moe_train.training.heartbeat import Heartbeat
from moe_train.training.history import Stretch, continued, to_plain, write_history
from moe_train.training.interval import Interval
from moe_train.training.origin import carry_origin, forget_origin
from moe_train.training.record import build_eval_record
from moe_train.training.run_config import RunConfig, to_dict
from moe_train.training.run_folder import CHECKPOINTS, holds_evaluation, index_folder, initial_weights, prepare
from moe_train.training.run_lock import only_run
from moe_train.training.schedules import lr_factor
from moe_train.training.side_files import spared
from moe_train.training.step import Requests, StepResult, left_out_step, train_step
from moe_train.training.stop import StopRequest
from moe_train.training.validation import BeforeEachBatch, ValidationSet, check_ids, check_vocabulary

LOCK_SECONDS = 120.0
"""How long a run waits for another one in its folder to end: longer than an NFSv4 server keeps the locks of a machine
that is gone (90 s)."""


def train(
    config: RunConfig,
    run_dir: Path,
    resume: str | None,
    stop: StopRequest,
    init_from: Path | None = None,
    beat: Heartbeat | None = None,
) -> bool:
    """Trains until the last step (True), or until ``stop`` is requested and a checkpoint is saved (False).

    ``resume``: None, "auto" (the run's latest checkpoint, if there is one) or the path of a checkpoint. ``init_from``:
    run folder or checkpoint whose weights a new run begins with. ``beat`` is told what the run is doing.
    """
    beat = beat or Heartbeat(None, 0)
    beat.note("load")
    groups = initialize(config.parallel)
    seconds = min(LOCK_SECONDS, config.parallel.timeout_seconds / 2)
    with only_run(run_dir, seconds, goes_on=resume == "auto"):
        return _train(config, run_dir, resume, stop, init_from, beat, groups)


def _train(
    config: RunConfig, run_dir: Path, resume: str | None, stop: StopRequest, init_from: Path | None, beat: Heartbeat,
    groups: Groups,
) -> bool:  # fmt: skip
    check_disk(config.checkpoint, run_dir / CHECKPOINTS)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # Nothing of ours draws from torch's own generators, but libraries might, and their state is in checkpoints.
    torch.manual_seed(config.seed * groups.world_size + groups.rank)
    with going_back(run_dir, resume):
        trainer = Trainer(config, run_dir, groups, beat)
        trainer.restore(resume, init_from)
    if groups.rank == 0:
        # Not earlier: what cannot start must not leave its configuration in the folder of a run that could.
        prepare(run_dir, config, resume, initial_weights(run_dir, resume, init_from))
        if resume is None or (resume != "auto" and trainer.elsewhere is not None):
            forget_origin(run_dir)  # of an attempt that took no step
        if trainer.elsewhere is not None and (note := carry_origin(run_dir, trainer.elsewhere, config.data)):
            print(note, flush=True)
        write_history(run_dir, trainer.history)
    status: Status = "failed"
    try:
        finished = trainer.run(stop)
        status = "finished" if finished else "interrupted"
    finally:
        trainer.close(status)
    return finished


class _Stopped(Exception):
    """A rank was asked to stop; raised on all of them at the same place."""


class Trainer:
    """Samples, engine and callbacks of one run; the position is ``step`` (optimizer steps taken)."""

    def __init__(self, config: RunConfig, run_dir: Path, groups: Groups, beat: Heartbeat) -> None:
        self.config = config
        self.beat = beat
        self.run_dir = run_dir
        self.groups = groups
        self.step = 0
        self.tokens = 0
        self.validation_owed = False
        """Of this step, and not made yet: a run that stops or dies before goes on with it."""
        self.elsewhere: Path | None = None
        """The checkpoint of another run or model that this one began with, as long as it has saved none of its own."""
        self.names = all_names(config.data)
        cache = index_folder(config, run_dir)
        check_gate_files(config)
        check_vocabulary([*self.names, *names_of(config.data.validation)], config.model.vocab_size)
        self.samples = open_training_set(
            config.data,
            seed=config.seed,
            batch_size=config.train.global_batch_size,
            cache=cache,
            once=partial(once_per_node, what="the index of samples"),
        )
        self.identity = self.samples.identity()
        self.validation: ValidationSet | None = None
        if config.eval.every and config.data.validation:
            # Now, since what is wrong with it should not come out after hours of training.
            batches = config.eval.steps * config.accumulation_steps(groups.world_size)
            data = config.data.validation
            self.validation = ValidationSet(config, groups, data, cache=cache, max_batches=batches)
            self.validation.check()
        model = build_language_model(
            config.model,
            config.router,
            sequence_length=config.data.sequence_length,
            seed=config.seed,
            recompute=config.train.recompute,
        )
        self.engine = Engine(model, groups, config.train, config.optimizer, config.deepspeed)
        self.reader = StepReader(
            self.samples,
            batch_size=config.train.global_batch_size,
            micro_size=config.train.micro_batch_size,
            rank=groups.data_rank,
            dp_size=groups.data_size,
        )
        self.callbacks = self._build_callbacks()
        self.profile = profile_hook(config.profile, run_dir, groups.rank)
        self.checkpoints = Checkpoints(config.checkpoint, run_dir / CHECKPOINTS, self.engine)
        self.watch = Watch(config.guard, run_dir, self.engine, self.samples, config.train.global_batch_size)
        self.facts = device_facts(config, groups)

    def restore(self, resume: str | None, init_from: Path | None = None) -> None:
        """Goes on from a checkpoint; "auto" without one begins anew. What begins has the weights of ``init_from``."""
        begun = begin(self.engine, self.config, self.run_dir, resume, init_from, self.identity)
        if self.groups.rank == 0:
            for note in begun.notes:
                print(note, flush=True)
        self.step, self.tokens, self.elsewhere = begun.step, begun.tokens, begun.elsewhere
        self.checkpoints.newest = begun.checkpoint
        self.watch.restore(begun.guard)
        made = partial(holds_evaluation, self.run_dir, self.step)
        self.validation_owed = self.validation is not None and begun.validation_owed and not from_rank_0(made)
        own = Stretch(
            after=self.step,
            run=str(self.run_dir.resolve()),
            processes=self.groups.world_size,
            config=to_dict(self.config),
            samples=self.identity,
        )
        self.history = continued(begun.history, own)
        self.checkpoints.restore_best()

    def run(self, stop: StopRequest) -> bool:
        """Returns True when everything was done, False when it stopped on request before."""
        config, options = self.config, self.config.train
        self._announce()
        if self.validation_owed and not self._validate(stop):
            return False
        interval = Interval()
        while self.step < options.steps:
            self.beat.note("train", self.step)
            self.profile.start_step(self.step + 1)
            result = self._train_step(Requests(stop=stop.requested, save=self.checkpoints.is_due()))
            self._spare("the profile", lambda: self.profile.end_step(self.step))
            if self.watch.wants_rewind:
                self._rewind()
                interval = Interval()
                continue
            if result.taken:
                self.callbacks.on_step(self.step, result)
                interval.add(result)
            else:
                interval.restart_clock()
            last = self.step == options.steps or result.requests.stop
            if (self.step % config.logging.every == 0 or last) and interval.steps:
                self._record(interval)
            self._check_replicas()
            self._tell(self.checkpoints.poll())
            done = self.step == options.steps
            self.validation_owed = self.validation is not None and (done or self.step % config.eval.every == 0)
            saves = self.checkpoints.wanted(self.step, asked=result.requests.save, last=last)
            if saves:
                self._save(last=last)
                interval.restart_clock()
            if result.requests.stop:
                break
            if self.validation_owed:
                if not self._validate(stop):
                    if not saves:
                        self._save(last=True)
                    break
                interval.restart_clock()
        self.beat.note("end", self.step)
        self._tell(self.checkpoints.finish())
        return self.step >= options.steps and not self.validation_owed

    def _save(self, *, last: bool) -> None:
        """``last``: the process ends after it, or after a validation."""
        self.beat.note("save", self.step)
        final = self.step == self.config.train.steps
        self._tell(self.checkpoints.save(self.step, self._state(), last=last, final=final))
        if last:
            # In place before anything else can fail or take long.
            self._tell(self.checkpoints.finish())

    def close(self, status: Status) -> None:
        if self.groups.rank == 0 and (summary := self.watch.summary()):
            print(f"bad numbers: {summary}", flush=True)
        self._spare("the profile", self.profile.close)
        self.callbacks.on_end(status)

    def _train_step(self, requests: Requests) -> StepResult:
        config = self.config
        if self.watch.leaves_out(self.step + 1):
            result = left_out_step()
        else:
            self.lr = config.optimizer.lr * lr_factor(self.step, config.train.steps, config.schedule)
            judge = partial(self.watch.judge, self.step + 1)
            try:
                result = train_step(
                    self.engine, self._batches(), lr=self.lr, seed=config.seed, step=self.step, requests=requests,
                    judge=judge,
                )  # fmt: skip
            except FloatingPointError:  # on every rank
                self._tell([*self.checkpoints.finish(), *self.watch.take_records()])
                raise
        self._tell(self.watch.take_records())
        self.step += 1
        self.tokens += result.tokens if result.taken else 0
        return result

    def _rewind(self) -> None:
        """Back to the newest checkpoint, as a run that is resumed from it but in place."""
        self._tell(self.checkpoints.finish())
        if self.checkpoints.newest is None:
            error = self.watch.nowhere()
            self._tell(self.watch.take_records())
            raise error
        self.beat.note("load", self.step)
        self.callbacks.on_end("rewound")
        self.callbacks = self._build_callbacks()
        self.restore(str(self.checkpoints.newest))
        self.watch.rewound(self.step)
        self._spare("rewinds.json, which the next checkpoint holds as well", self.watch.keep)
        self._announce()
        self._tell(self.watch.take_records())

    def _check_replicas(self) -> None:
        try:
            self.watch.check_replicas(self.step, self.tokens)
        finally:
            self._tell(self.watch.take_records())

    def _build_callbacks(self) -> Callbacks:
        goes_on = self.config.checkpoint.on_error == "continue"
        more = alarms(self.config)
        return build_callbacks(self.config.logging, self.run_dir, self.groups.rank, more, goes_on=goes_on)

    def _spare(self, what: str, write: Callable[[], None]) -> None:
        """Not collective: only rank 0 writes these."""
        spared(self.config.checkpoint, what, write)

    def _batches(self) -> list[Batch]:
        """This rank's micro-batches of the next step."""
        batches = self.reader.batches(self.step)
        for batch in batches:
            check_ids(batch, self.names, self.config.model.vocab_size)
        return batches

    def _announce(self) -> None:
        config = self.config
        write_facts(config, self.groups, self.run_dir, self.samples, self.step)
        self.callbacks.on_start(RunInfo(config.name, self.run_dir, config.train.steps, self.step, to_dict(config)))

    def _record(self, interval: Interval) -> None:
        record = interval.record(
            step=self.step,
            tokens=self.tokens,
            lr=self.lr,
            grad_norm=self.engine.gradient_norm(),
            memory_bytes=self.groups.largest(memory_used(self.groups.device)),
            facts=self.facts,
            per_layer=self.config.logging.per_layer,
            max_layer_tags=self.config.logging.max_layer_tags,
        )
        self.callbacks.on_record(record)

    def _validate(self, stop: StopRequest) -> bool:
        """False where it was given up for a request to stop."""
        self.beat.note("validate", self.step)
        self.engine.set_training(False)

        def between() -> None:
            """A validation can take long: neither a checkpoint nor a stop waits for its end."""
            self._tell(self.checkpoints.poll())
            if self.groups.largest(int(stop.requested)):
                raise _Stopped

        try:
            assert self.validation is not None, "none is owed without"
            result = self.validation.evaluate(self.engine, [BeforeEachBatch(between)])
        except _Stopped:
            return False
        self.validation_owed = False
        found = result.to_json(step=self.step)
        self._tell(self.checkpoints.save_if_best(self.step, self._state(), found["loss"]))
        # Recorded when nothing of it can be lost any more: what is recorded is not made again.
        self.callbacks.on_record(build_eval_record(self.step, found))
        return True

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says of the position."""
        return {
            "consumed": self.step * self.config.train.global_batch_size,
            "tokens": self.tokens,
            "samples": self.identity,
            "config": to_dict(self.config),
            "history": to_plain(self.history),
            "guard": self.watch.state(),
            "validation_owed": self.validation_owed,
        }

    def _tell(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            self.callbacks.on_record(record)
