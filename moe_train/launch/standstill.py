"""A launch none of whose ranks makes progress any more."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.training.heartbeat import Beat
from moe_train.training.worker_status import WorkerStatus


class Standstill:
    """Beats tell when a rank's last progress was, by the clock of its machine, which may be set, and differ from ours.
    So only that it changes counts, as for Silence."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last: dict[tuple[str, int], tuple[float, float]] = {}
        """Host and process -> time of its last progress, and when we saw that first."""

    def look(self, statuses: Sequence[WorkerStatus], beats: Sequence[Beat], now: float) -> list[Beat]:
        """The beats of all ranks that have not ended, if none of them has made progress for too long. One that works
        while the others wait for it is enough: it may have much to do.

        now: of a clock that never goes back.
        """
        for beat in beats:
            key = (beat.host, beat.pid)
            if key not in self._last or self._last[key][0] != beat.progress:
                self._last[key] = (beat.progress, now)
        running = {(status.host, status.pid) for status in statuses if status.exit_code is None and not status.died}
        # A process that was started in place of another may not have written yet: the file is still that of the other.
        found = [beat for beat in beats if (beat.host, beat.pid) in running]
        if not found or len(found) < len(running):
            return []
        newest = max(self._last[beat.host, beat.pid][1] for beat in found)
        return found if now - newest > self.seconds else []
