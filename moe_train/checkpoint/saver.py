"""Saving checkpoints together with all ranks, in the background if wanted.

No rank talks to another while files are written. A save begins with a copy of what the rank owns (in the background) or
with the tensors themselves; each rank writes its own files; then, between two steps, the ranks agree that all have
written, hand rank 0 what they wrote, and rank 0 puts the checkpoint in place. Whatever happens before leaves a folder
that is no checkpoint, and the earlier ones untouched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.checkpoint import store
from moe_train.checkpoint.index import Index, merge
from moe_train.checkpoint.retention import Retention, obsolete
from moe_train.checkpoint.shared import hosts_without
from moe_train.checkpoint.slices import OwnedSlice, cut
from moe_train.checkpoint.writing import lazy, write_boxes
from moe_train.parallel.passing import may_pass

Failure = tuple[str, bool]
"""What went wrong, and whether that may pass."""


class CheckpointError(OSError):
    """A checkpoint could not be written; what was there before is untouched. ``passing``: it may go better another
    time."""

    def __init__(self, text: str, *, passing: bool = False) -> None:
        super().__init__(text)
        self.passing = passing


class UnsharedError(CheckpointError):
    """Not all machines see the folder."""


def unshared(path: Path, hosts: list[str]) -> str:
    """What to say where these machines do not see a folder of the run."""
    return (
        f"checkpoint {path}: {', '.join(hosts)} cannot see what rank 0 writes there. All nodes need the run folder on "
        "a disk that they share: choose one with --run-dir"
    )


@dataclass
class _Save:
    """One that has begun."""

    final: Path
    slices: list[OwnedSlice]
    state: dict[str, Any]
    pointers: tuple[str, ...]
    written: Index | None = None
    error: Failure | None = None
    thread: threading.Thread | None = None

    def write(self) -> None:
        """Writes this rank's files; never raises."""
        try:
            boxes = (lazy(box) for owned in self.slices for box in cut(owned))
            self.written = write_boxes(store.temporary_of(self.final), f"__{dist.get_rank()}_", boxes)
        except BaseException as error:
            self.error = _reason(error), may_pass(error)
        finally:
            self.slices = []


@dataclass
class Saver:
    """Saves one checkpoint after another into a folder. Everything is collective: all ranks call it alike.

    asynchronous: files are written by a thread, from a copy in the host's memory; the copy's memory is kept.
    """

    root: Path
    retention: Retention = Retention()
    asynchronous: bool = False
    _running: _Save | None = None
    _blind: list[str] | None = None
    """Machines that do not see the folder; None before anybody has looked."""
    _copies: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def save(
        self,
        step: int,
        slices: list[OwnedSlice],
        state: dict[str, Any],
        *,
        kind: str = store.STEP,
        pointers: tuple[str, ...] = (store.LATEST,),
    ) -> None:
        """Begins a save, once the one before has ended; without ``asynchronous`` it is complete on return.

        Errors: CheckpointError, on every rank, where the one before or this one failed on any.
        """
        self.wait()
        final = store.folder_of(self.root, step, kind)
        self._on_rank_0(lambda: store.begin(self.root, final), final)
        self._check_shared(store.temporary_of(final))
        state = {"step": step, "saved_at": time.time(), **state}
        self._running = _Save(final, slices, state, pointers)
        if not self.asynchronous:
            self._running.write()
            self._complete()
            return
        self._running.slices = [self._copy(owned) for owned in slices]
        _arrived(slices)
        self._running.thread = threading.Thread(target=self._running.write, name="checkpoint", daemon=True)
        self._running.thread.start()

    def poll(self) -> Path | None:
        """Puts the checkpoint that is being written in place if all ranks have written it; its path then.

        Call it between two steps; costs one all-reduce while a save is under way, else nothing.
        Errors: CheckpointError, on every rank.
        """
        if self._running is None or self._running.thread is None:
            return None
        return self._complete() if _all(not self._running.thread.is_alive()) else None

    def wait(self) -> Path | None:
        """Likewise, waiting for it."""
        if self._running is None:
            return None
        if self._running.thread is not None:
            self._running.thread.join()
        return self._complete()

    def _check_shared(self, temporary: Path) -> None:
        """CheckpointError where a rank does not see what rank 0 has made: nodes without a disk in common."""
        if self._blind is None:
            self._blind = hosts_without(temporary)
        if self._blind:
            raise UnsharedError(unshared(temporary, self._blind))

    def _complete(self) -> Path:
        save, self._running = self._running, None
        assert save is not None
        errors = _gathered(save.error)
        failed = next((error for error in errors if error is not None), None)
        if failed is not None:
            self._remove(save)
            raise CheckpointError(_failure(save.final, failed[0]), passing=failed[1])
        parts: list[Index | None] = [None] * dist.get_world_size()
        if dist.get_world_size() > 1:
            dist.gather_object(save.written, parts if dist.get_rank() == 0 else None)
        else:
            parts = [save.written]
        try:
            self._on_rank_0(lambda: self._publish(save, [part for part in parts if part is not None]), save.final)
        except CheckpointError:
            self._remove(save)
            raise
        return save.final

    def _remove(self, save: _Save) -> None:
        """Of a save that failed, once all ranks have ended theirs: a disk that it has filled is needed by others."""
        temporary = store.temporary_of(save.final)
        with suppress(OSError):  # the failure itself is what the ranks are to hear of
            if dist.get_rank() == 0 and temporary.exists():
                store.remove([temporary])

    def _publish(self, save: _Save, parts: list[Index]) -> None:
        earlier = store.readable(self.root)
        # What is saved later counts as newer, also where the clock has gone back since (another host, a correction).
        at = max([save.state["saved_at"], *(one.at + 1e-3 for one in earlier)])
        # Of weights that are saved again as the best: they stay those of the end as well.
        state = save.state | {"saved_at": at} | ({"final": True} if store.are_of_the_end(save.final) else {})
        store.finish(store.temporary_of(save.final), merge(parts), state)
        outdated = store.weights_named_by(self.root, save.pointers)
        store.put_in_place(save.final, save.pointers)
        old = [store.folder_of(self.root, step) for step in obsolete(store.readable(self.root), self.retention)]
        named = {store.named_or_none(self.root, pointer) for pointer in (store.LATEST, store.BEST)}
        store.remove(path for path in [*store.replaced(self.root), *outdated, *old] if path not in named)

    def _copy(self, owned: OwnedSlice) -> OwnedSlice:
        """In the host's memory, which is kept from save to save."""
        place = (owned.key, owned.start)
        copy = self._copies.get(place)
        if copy is None or copy.shape != owned.data.shape or copy.dtype != owned.data.dtype:
            copy = torch.empty(owned.data.shape, dtype=owned.data.dtype, pin_memory=owned.data.device.type == "cuda")
            self._copies[place] = copy
        copy.copy_(owned.data.detach(), non_blocking=True)
        return replace(owned, data=copy)

    def _on_rank_0(self, action: Callable[[], object], final: Path) -> None:
        """Runs an action on one rank; if it fails, every rank raises CheckpointError."""
        failure: list[Failure | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except (OSError, ValueError) as error:
                failure = [(_failure(final, _reason(error)), may_pass(error))]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise CheckpointError(failure[0][0], passing=failure[0][1])


def _arrived(slices: list[OwnedSlice]) -> None:
    """Waits for the copies from devices."""
    for device in {owned.data.device for owned in slices if owned.data.device.type == "cuda"}:
        torch.cuda.synchronize(device)


def _all(flag: bool) -> bool:
    """Whether it holds on every rank."""
    if dist.get_world_size() == 1:
        return flag
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return bool(value)


def _gathered(error: Failure | None) -> list[Failure | None]:
    if dist.get_world_size() == 1:
        return [error]
    errors: list[Failure | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return errors


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def _failure(final: Path, reason: str) -> str:
    return (
        f"checkpoint {final} could not be saved: {reason}. Earlier checkpoints are untouched; free space or choose "
        "another --run-dir, then go on with --resume auto"
    )
