"""The same tasks on a Ray cluster; the work folder must be on storage that all of its nodes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from moe_train.data.prepare.executors import Counts, Result
from moe_train.data.prepare.part import PartFacts
from moe_train.data.prepare.work import Context, Task, perform, tokenizer_of

_POLL_SECONDS = 0.5


class Ray:
    """The cluster that RAY_ADDRESS names or this machine belongs to; else one of ``workers`` processes here.

    Errors: ValueError where Ray is not installed.
    """

    def __init__(self, context: Context, workers: int, on_batch: Callable[[], None]) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("--executor ray needs Ray: pip install 'moe-train[ray]'") from error
        self._on_batch = on_batch
        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            _connect(ray, workers)
        self._context = ray.put(context)
        self._do = ray.remote(num_cpus=1, max_retries=3)(_perform)
        self._count = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._counts = Counts(0, 0, 0, 0)

    def run(self, tasks: Iterator[Task]) -> Iterator[Result]:
        begun: dict[Any, Task] = {}
        more = True
        try:
            while more or begun:
                while more and len(begun) <= self._count:
                    task = next(tasks, None)
                    if task is None:
                        more = False
                    else:
                        begun[self._do.remote(self._context, task)] = task
                done, _ = self._ray.wait(list(begun), timeout=_POLL_SECONDS) if begun else ([], [])
                self._on_batch()
                for reference in done:
                    task = begun.pop(reference)
                    try:
                        facts = self._ray.get(reference)
                    except self._ray.exceptions.RayError as error:
                        raise OSError(f"a task on the Ray cluster failed: {error}") from error
                    if facts is not None:
                        values = (facts.documents, facts.tokens, facts.text_bytes, facts.text_bytes)
                        self._counts = Counts(*map(sum, zip(self._counts, values, strict=True)))
                    yield task, facts
        finally:
            for reference in begun:
                self._ray.cancel(reference, force=True)
            if self._own:
                self._ray.shutdown()

    def counts(self) -> Counts:
        """Of the pieces that are done."""
        return self._counts


def _connect(ray: Any, workers: int) -> None:
    try:
        ray.init(address="auto", log_to_driver=False)
    except ConnectionError:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)


def _perform(context: Context, task: Task) -> PartFacts | None:
    return perform(context, tokenizer_of(context.tokenizer), task)
