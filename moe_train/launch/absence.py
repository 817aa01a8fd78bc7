"""A launch none of whose workers runs."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.training.worker_status import WorkerStatus


class Absence:
    """What starts workers may hang before there are any (a stuck ssh, a network disk that imports wait for), and then
    no beat tells of it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._since: float | None = None
        self._seen = False

    def look(self, statuses: Sequence[WorkerStatus], now: float) -> bool:
        """Whether there has been none for too long; then the time begins anew. When all have finished, none is missed.

        now: of a clock that never goes back.
        """
        self._seen = self._seen or bool(statuses)
        running = any(status.exit_code is None and not status.died for status in statuses)
        # Files that were there are gone when their disk is away, which says nothing.
        finished = self._seen and all(status.exit_code == 0 for status in statuses)
        if running or finished or self._since is None:
            self._since = now
        if now - self._since <= self.seconds:
            return False
        self._since = now
        return True
