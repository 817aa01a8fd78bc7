"""Workers of other machines that have fallen silent."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.training.heartbeat import Beat
from moe_train.training.worker_status import WorkerStatus


class Silence:
    """Whether a process of another machine lives cannot be asked. But it writes a heartbeat every second onto the disk
    that all share; only that it changes counts, since the clocks of machines differ."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last: dict[tuple[str, int], tuple[float, float]] = {}
        """Host and process -> time in its last beat, and when we saw that first."""

    def look(self, statuses: Sequence[WorkerStatus], beats: Sequence[Beat], now: float) -> list[int]:
        """Ranks of other machines that have written nothing for too long, while another rank did. When all are silent
        at once the disk is: that says nothing about them.

        now: of a clock that never goes back.
        """
        for beat in beats:
            key = (beat.host, beat.pid)
            if key not in self._last or self._last[key][0] != beat.time:
                self._last[key] = (beat.time, now)
        running = {
            (status.host, status.pid): status for status in statuses if status.exit_code is None and not status.died
        }
        seen = {key: self._last[key][1] for key in running if key in self._last}
        if not seen or now - max(seen.values()) > self.seconds / 4:
            return []
        return sorted(
            running[key].rank for key, time in seen.items() if now - time > self.seconds and not running[key].is_local
        )
