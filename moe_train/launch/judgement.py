"""What is wrong with the hosts of a launch, from what they said of themselves: the odd one out is named."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CLOCK_SECONDS = 1.0
"""By how much a clock may differ from the others'."""
SLOW = 0.5
"""A host whose best link has less than this share of the usual bandwidth is slow."""
GIB = 2**30
LEAST_DISK = 2 * GIB


@dataclass(frozen=True)
class Report:
    """Of one host; what could not be found out is missing in it."""

    error: str = ""
    """Why it does not answer."""
    name: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    devices: Sequence[Mapping[str, Any]] = ()
    """name and memory (bytes) of each."""
    cores: int = 0
    memory: int = 0
    disk_free: int = 0
    clock: float = 0.0
    """Seconds that it is ahead of the machine that asks."""
    clock_doubt: float = 0.0
    sees: frozenset[str] = frozenset()
    """Hosts whose file in the run folder it sees."""
    disk_error: str = ""


@dataclass(frozen=True)
class Problem:
    host: str
    """Empty: of all together."""
    text: str


def judge(reports: Mapping[str, Report], slots: Mapping[str, int], links: Mapping[str, Any] | None) -> list[Problem]:
    """All problems.

    reports: by host, in the order of the hostfile.   slots: workers on each.   links: what bandwidth.py prints.
    """
    silent = [Problem(host, report.error) for host, report in reports.items() if report.error]
    heard = {host: report for host, report in reports.items() if not report.error}
    if not heard:
        return silent
    return [
        *silent,
        *_versions(heard),
        *_devices(heard, slots),
        *_disks(heard),
        *_clocks(heard),
        *_links(reports, links),
    ]


def _versions(reports: Mapping[str, Report]) -> list[Problem]:
    names = dict.fromkeys(name for report in reports.values() for name in report.versions)
    found = []
    for name in names:
        found += _odd({host: report.versions.get(name, "missing") for host, report in reports.items()}, name)
        if all(report.versions.get(name) == "missing" for report in reports.values()):
            found.append(Problem("", f"{name} is missing everywhere"))
    return found


def _devices(reports: Mapping[str, Report], slots: Mapping[str, int]) -> list[Problem]:
    found = [
        Problem(host, f"{slots[host]} slots, but {len(report.devices)} accelerators")
        for host, report in reports.items()
        if any(other.devices for other in reports.values()) and len(report.devices) < slots.get(host, 0)
    ]
    kinds = {host: _kind(report.devices) for host, report in reports.items() if report.devices}
    return found + _odd(kinds, "accelerators")


def _kind(devices: Sequence[Mapping[str, Any]]) -> str:
    names = Counter(f"{device['name']}, {device['memory'] / GIB:.0f} GiB" for device in devices)
    return " and ".join(sorted(names))


def _odd(values: Mapping[str, str], what: str) -> list[Problem]:
    """Hosts whose value is not that of most; without a majority one problem that tells all values."""
    counts = Counter(values.values())
    if len(counts) < 2:
        return []
    common, number = counts.most_common(1)[0]
    if 2 * number > len(values):
        rest = f"{number} of {len(values)} hosts have {common}"
        return [Problem(host, f"{what}: {value}, but {rest}") for host, value in values.items() if value != common]
    each = "; ".join(f"{', '.join(h for h in values if values[h] == value)}: {value}" for value in counts)
    return [Problem("", f"{what} differs: {each}")]


def _disks(reports: Mapping[str, Report]) -> list[Problem]:
    found = [
        Problem(host, f"the run folder: {report.disk_error}") for host, report in reports.items() if report.disk_error
    ]
    found += [
        Problem(host, f"only {report.disk_free / GIB:.1f} GiB free; a checkpoint takes 12 to 16 bytes per parameter")
        for host, report in reports.items()
        if report.disk_free < LEAST_DISK
    ]
    writers = {host: report for host, report in reports.items() if not report.disk_error}
    if all(report.sees >= writers.keys() for report in writers.values()):
        return found
    groups = Counter(report.sees for report in writers.values())
    common, number = groups.most_common(1)[0]
    if 2 * number > len(writers):
        return found + [
            Problem(host, f"the run folder is on another disk than that of {', '.join(sorted(common))}")
            for host, report in writers.items()
            if report.sees != common
        ]
    return [
        *found,
        Problem("", "the run folder is not on a disk that all share, which checkpoints need: choose --run-dir"),
    ]


def _clocks(reports: Mapping[str, Report]) -> list[Problem]:
    # The machine that asks is one more, by definition right.
    usual = statistics.median([0.0, *(report.clock for report in reports.values())])
    return [
        Problem(host, f"the clock is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}: set it by NTP")
        for host, report in reports.items()
        if abs(ahead := report.clock - usual) > CLOCK_SECONDS + report.clock_doubt
    ]


def best_links(hosts: Sequence[str], links: Mapping[str, Any] | None) -> dict[str, float]:
    """Bytes per second of each host's fastest link: a slow partner takes nothing from it."""
    best: dict[str, float] = {}
    for low, high, rate in (links or {}).get("pairs", ()):
        for number in (low, high):
            best[hosts[number]] = max(rate, best.get(hosts[number], 0.0))
    return best


def _links(reports: Mapping[str, Report], links: Mapping[str, Any] | None) -> list[Problem]:
    if links is None:
        return []
    if "error" in links:
        return [Problem("", f"the hosts together: {links['error']}")]
    best = best_links(list(reports), links)
    if len(best) < 3:  # of two, nobody can say which is slow
        return []
    usual = statistics.median(best.values())
    return [
        Problem(host, f"its best link has {rate / 1e9:.2f} GB/s, usual are {usual / 1e9:.2f} GB/s")
        for host, rate in best.items()
        if rate < SLOW * usual
    ]
