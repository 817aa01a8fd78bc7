"""A torch profiler window and a memory snapshot, written to <run>/profile/. Not a Callback: it needs to know when a
step starts and ends, and one rank has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_train.training.options import ProfileOptions


class StepHook:
    """Told about every step; this one does nothing."""

    def start_step(self, step: int) -> None:
        """Before step ``step`` (from 1)."""

    def end_step(self, step: int) -> None:
        """After the optimizer moved."""

    def close(self) -> None:
        """When the run ends, also inside the window."""


def profile_hook(options: ProfileOptions, run_dir: Path, rank: int = 0) -> StepHook:
    """The profiler on rank 0 when ``options.start_step`` is not 0, else a hook that does nothing."""
    if options.start_step <= 0 or rank != 0:
        return StepHook()
    return ProfilerWindow(options, run_dir / "profile")


class ProfilerWindow(StepHook):
    """Profiles steps start_step ... start_step + steps - 1: trace_<first>_<last>.json (chrome://tracing or Perfetto),
    a table of operators in summary_<first>_<last>.txt and, with ``memory`` on CUDA, memory_<first>_<last>.pickle
    (pytorch.org/memory_viz). A run that ends inside the window writes what was recorded."""

    def __init__(self, options: ProfileOptions, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.first = options.start_step
        self.last = options.start_step + options.steps - 1
        self._profiler: Any = None
        self._step = 0

    def start_step(self, step: int) -> None:
        if self._profiler is not None or not self.first <= step <= self.last:
            return
        self.first = step  # A resumed run may start inside the window.
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            if self.options.memory:
                torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self._profiler = torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=self.options.memory
        )
        self._profiler.start()

    def end_step(self, step: int) -> None:
        if self._profiler is None:
            return
        self._step = step
        if step >= self.last:
            self._write()

    def close(self) -> None:
        if self._profiler is not None:
            self._write()

    def _write(self) -> None:
        profiler, self._profiler = self._profiler, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        window = f"{self.first}_{max(self._step, self.first)}"
        profiler.export_chrome_trace(str(self.folder / f"trace_{window}.json"))
        sort_by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=sort_by, row_limit=40)
        note = ""
        if self.options.memory and not torch.cuda.is_available():
            note = "profile.memory: a snapshot exists on CUDA only; the memory columns above are the allocator's.\n"
        (self.folder / f"summary_{window}.txt").write_text(f"{table}\n{note}", encoding="utf-8")
        if self.options.memory and torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory_{window}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
