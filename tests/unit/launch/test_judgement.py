"""The odd host out, from reports of made-up hosts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moe_train.launch.bandwidth import ALL_PAIRS, rounds
from moe_train.launch.judgement import GIB, Report, best_links, judge

NAMES = ("a", "b", "c", "d")
VERSIONS = {"python": "3.11.2", "torch": "2.10.0"}
GPU = {"name": "H100", "memory": 80 * GIB}


def cluster(count: int = 4, **more: Any) -> dict[str, Report]:
    hosts = NAMES[:count]
    report = Report(versions=VERSIONS, memory=64 * GIB, disk_free=100 * GIB, sees=frozenset(hosts), **more)
    return {host: report for host in hosts}


def said(reports: dict[str, Report], links: dict[str, Any] | None = None, slots: int = 1) -> list[tuple[str, str]]:
    return [(problem.host, problem.text) for problem in judge(reports, dict.fromkeys(reports, slots), links)]


def test_nothing_is_wrong() -> None:
    links = {"pairs": [(low, high, 1e9) for low in range(4) for high in range(low + 1, 4)]}
    assert said(cluster(), links) == []
    assert said(cluster(devices=[GPU, GPU]), links, slots=2) == []
    assert said(cluster(1)) == []


def test_a_host_that_does_not_answer() -> None:
    reports = cluster() | {"c": Report(error="connection refused")}
    assert ("c", "connection refused") in said(reports)


def test_a_version_that_differs_from_the_majority() -> None:
    reports = cluster()
    reports["c"] = replace(reports["c"], versions=VERSIONS | {"torch": "2.9.1"})
    assert said(reports) == [("c", "torch: 2.9.1, but 3 of 4 hosts have 2.10.0")]
    reports["c"] = replace(reports["c"], versions={"python": "3.11.2"})
    assert said(reports) == [("c", "torch: missing, but 3 of 4 hosts have 2.10.0")]


def test_two_hosts_have_no_majority() -> None:
    reports = cluster(2)
    reports["b"] = replace(reports["b"], versions=VERSIONS | {"torch": "2.9.1"})
    assert said(reports) == [("", "torch differs: a: 2.10.0; b: 2.9.1")]


def test_missing_everywhere() -> None:
    assert said(cluster(2) | {h: replace(r, versions={"torch": "missing"}) for h, r in cluster(2).items()}) == [
        ("", "torch is missing everywhere")
    ]


def test_accelerators() -> None:
    reports = cluster(devices=[GPU, GPU])
    reports["b"] = replace(reports["b"], devices=[GPU])
    assert said(reports, slots=2) == [("b", "2 slots, but 1 accelerators")]
    reports["b"] = replace(reports["b"], devices=[{"name": "A100", "memory": 40 * GIB}] * 2)
    assert said(reports, slots=2) == [("b", "accelerators: A100, 40 GiB, but 3 of 4 hosts have H100, 80 GiB")]
    reports["b"] = replace(reports["b"], devices=[])
    assert said(reports, slots=2) == [("b", "2 slots, but 0 accelerators")]


def test_a_disk_of_its_own() -> None:
    three = frozenset("abd")
    reports = {host: replace(report, sees=three) for host, report in cluster().items()}
    reports["c"] = replace(reports["c"], sees=frozenset("c"))
    assert said(reports) == [("c", "the run folder is on another disk than that of a, b, d")]
    apart = {host: replace(report, sees=frozenset(host)) for host, report in cluster(2).items()}
    ((host, text),) = said(apart)
    assert host == "" and "not on a disk that all share" in text and "--run-dir" in text


def test_a_disk_that_cannot_be_written_or_is_full() -> None:
    reports = {host: replace(report, sees=frozenset("abd")) for host, report in cluster().items()}
    reports["c"] = replace(reports["c"], disk_error="PermissionError: no")
    reports["d"] = replace(reports["d"], disk_free=GIB)
    assert said(reports) == [
        ("c", "the run folder: PermissionError: no"),
        ("d", "only 1.0 GiB free; a checkpoint takes 12 to 16 bytes per parameter"),
    ]


@pytest.mark.parametrize("offset", [-30.0, 5.0])
def test_a_clock_that_is_wrong(offset: float) -> None:
    for count in (2, 4):
        reports = cluster(count)
        reports["b"] = replace(reports["b"], clock=offset)
        ((host, text),) = said(reports)
        assert host == "b" and ("ahead" if offset > 0 else "behind") in text
    # Ours may be the wrong one.
    assert said({host: replace(report, clock=offset) for host, report in cluster().items()}) == []
    # A slow answer is no wrong clock.
    reports["b"] = replace(reports["b"], clock=1.5, clock_doubt=1.0)
    assert said(reports) == []


def test_a_slow_link() -> None:
    def rate(low: int, high: int) -> float:
        return 2e8 if 2 in (low, high) else 1e9

    links = {"pairs": [(low, high, rate(low, high)) for low in range(4) for high in range(low + 1, 4)]}
    ((host, text),) = said(cluster(), links)
    assert host == "c" and "0.20 GB/s, usual are 1.00" in text
    ring = {"pairs": [(low, high, rate(low, high)) for low, high in ((0, 1), (1, 2), (2, 3), (0, 3))]}
    assert [host for host, _ in said(cluster(), ring)] == ["c"]
    assert best_links(NAMES, ring) == {"a": 1e9, "b": 1e9, "c": 2e8, "d": 1e9}
    assert said(cluster(2), {"pairs": [(0, 1, 1.0)]}) == []


def test_links_that_do_not_work() -> None:
    assert said(cluster(), {"error": "timed out"}) == [("", "the hosts together: timed out")]


@pytest.mark.parametrize("hosts", range(1, 13))
def test_rounds(hosts: int) -> None:
    found = list(rounds(hosts))
    for pairs in found:
        flat = [host for pair in pairs for host in pair]
        assert len(flat) == len(set(flat)), "a host has two partners at once"
    pairs = [pair for each in found for pair in each]
    if hosts <= ALL_PAIRS:
        assert sorted(pairs) == [(low, high) for low in range(hosts) for high in range(low + 1, hosts)]
    else:
        assert sorted(pairs) == sorted([(host, host + 1) for host in range(hosts - 1)] + [(0, hosts - 1)])
