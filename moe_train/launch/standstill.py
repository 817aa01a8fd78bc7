"""A launch none of whose ranks makes progress any more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_train.training.heartbeat import INTERVAL, Beat
from moe_train.training.worker_status import WorkerStatus

_LATE = 10.0
"""Between two looks, at least: then the disk has kept the looks waiting, and the beats too."""
_GRACE = 30.0
"""For the first beat after a disk can be written again."""

Key = tuple[str, int]
"""Host and process."""


class Standstill:
    """Beats tell when a rank's last progress was, by the clock of its machine, which may be set, and differ from ours.
    So only that it changes counts, as for Silence.

    A rank whose beats cannot be written may be working. So when all of them are old, the disk is looked at first.
    """

    def __init__(
        self,
        seconds: float,
        fault: Callable[[], str] = lambda: "",
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """fault: why nothing can be written where the beats lie; empty where it can."""
        self.seconds, self._fault, self._say = seconds, fault, say
        self._progress: dict[Key, tuple[float, float]] = {}
        """Time of the last progress, and when we saw that first."""
        self._written: dict[Key, tuple[float, float]] = {}
        """Time in the last beat, likewise."""
        self._before: float | None = None
        """The last look that saw all."""
        self._writable: float | None = None
        """Since when the disk can be written while no beats come."""
        self._told = False

    def look(self, statuses: Sequence[WorkerStatus], beats: Sequence[Beat], now: float) -> list[Beat]:
        """The beats of all ranks that have not ended, if none of them has made progress for too long; then the time
        begins anew. One that works while the others wait for it is enough: it may have much to do.

        now: of a clock that never goes back.
        """
        running = {(status.host, status.pid) for status in statuses if status.exit_code is None and not status.died}
        # A process that was started in place of another may not have written yet: the file is still that of the other.
        found = {(beat.host, beat.pid): beat for beat in beats if (beat.host, beat.pid) in running}
        if not found or len(found) < len(running):
            return []
        late = self._before is not None and now - self._before > max(_LATE, self.seconds / 4)
        self._before = now
        for key, beat in found.items():
            if late or key not in self._progress or self._progress[key][0] != beat.progress:
                self._progress[key] = (beat.progress, now)
            if late or key not in self._written or self._written[key][0] != beat.time:
                self._written[key] = (beat.time, now)
        if now - max(self._progress[key][1] for key in found) <= self.seconds:
            self._writable = None
            return []
        quiet = now - max(self._written[key][1] for key in found)
        if quiet > min(10 * INTERVAL, self.seconds / 2) and not self._is_theirs(quiet, now):
            return []
        self._begin_anew(now)
        return list(found.values())

    def _is_theirs(self, quiet: float, now: float) -> bool:
        """Whether it is the processes that write nothing, and not the disk."""
        if fault := self._fault():
            if not self._told:
                self._say(
                    f"no rank has written a heartbeat for {quiet:.0f} s, but neither can this process write into the "
                    f"run's folder ({fault}): the ranks may be working, so none is killed while that lasts"
                )
            self._told = True
            self._begin_anew(now)
            return False
        # The disk may have come back a moment ago.
        self._writable = now if self._writable is None else self._writable
        return now - self._writable >= min(_GRACE, self.seconds)

    def _begin_anew(self, now: float) -> None:
        self._writable = None
        self._progress = {key: (progress, now) for key, (progress, _) in self._progress.items()}
