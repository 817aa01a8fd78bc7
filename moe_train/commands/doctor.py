"""Say what is installed, whether it works, and what to do about what is missing.

With --hostfile look at all hosts of a launch before a run: versions, accelerators, memory, disk, clocks, whether the
run folder is on a disk that they share, and how fast they exchange data; the odd one out is named.

Exit code 1 if training cannot work, or if something is wrong with the hosts.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_train.launch.judgement import Problem, Report

GIB = 2**30


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    hosts = parser.add_argument_group("hosts")
    hosts.add_argument("--hostfile", type=Path, metavar="H", help="lines `host slots=N`, as for train")
    hosts.add_argument("--include", default="", metavar="SPEC", help="of the hostfile only these, as for train")
    hosts.add_argument("--exclude", default="", metavar="SPEC", help="of the hostfile all but these")
    hosts.add_argument("--run-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    hosts.add_argument("--master-addr", metavar="A", help="address of the first host, as for train")
    hosts.add_argument("--master-port", type=int, metavar="P", help="default 29500")


def run(arguments: argparse.Namespace) -> int:
    return _machine(arguments.json) if arguments.hostfile is None else _hosts(arguments)


def _machine(as_json: bool) -> int:
    from moe_train.launch.doctor import examine

    findings = []
    for finding in examine():
        findings.append(finding)
        if as_json:
            continue
        print(f"{finding.state:<8}{finding.name:<17} {finding.text}", flush=True)
        if finding.advice:
            print(f"{'':<24}-> {finding.advice}", flush=True)
    missing = sum(finding.state == "missing" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not missing, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print("Everything that training needs is here." if not missing else f"{missing} missing: see the arrows above.")
    return 1 if missing else 0


def _hosts(arguments: argparse.Namespace) -> int:
    from moe_train.launch.examination import examine_hosts, try_links
    from moe_train.launch.judgement import judge
    from moe_train.launch.plan import LaunchOptions

    options = LaunchOptions(
        hostfile=arguments.hostfile,
        include=arguments.include,
        exclude=arguments.exclude,
        master_addr=arguments.master_addr,
        master_port=arguments.master_port,
    )
    reports = examine_hosts(options, arguments.run_dir, os.environ)
    # A host that does not answer would only make the others wait.
    links = None if any(report.error for report in reports.values()) else try_links(options, os.environ)
    slots = {host: len(numbers) for host, numbers in options.slots.items()}
    problems = judge(reports, slots, links)
    if arguments.json:
        print(json.dumps(_plain(reports, slots, links, problems), indent=1))
    else:
        _print(reports, slots, links, problems)
    return 1 if problems else 0


def _plain(
    reports: Mapping[str, Report],
    slots: Mapping[str, int],
    links: Mapping[str, Any] | None,
    problems: Sequence[Problem],
) -> dict[str, Any]:
    hosts = {
        host: asdict(report) | {"slots": slots[host], "sees": sorted(report.sees)} for host, report in reports.items()
    }
    return {"ok": not problems, "hosts": hosts, "links": links, "problems": [asdict(problem) for problem in problems]}


def _print(
    reports: Mapping[str, Report],
    slots: Mapping[str, int],
    links: Mapping[str, Any] | None,
    problems: Sequence[Problem],
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from moe_train.launch.judgement import best_links

    console = Console(highlight=False, soft_wrap=True)
    table = Table()
    for name in ("host", "slots", "devices", "cores", "memory", "disk free", "clock", "best link"):
        table.add_column(name, no_wrap=name == "host")
    best = best_links(list(reports), links)
    for host, report in reports.items():
        if report.error:
            table.add_row(Text(host), str(slots[host]), *["-"] * 6)
            continue
        table.add_row(
            Text(host),
            str(slots[host]),
            Text(_devices(report)),
            str(report.cores),
            f"{report.memory / GIB:.0f} GiB",
            f"{report.disk_free / GIB:.0f} GiB",
            f"{1000 * report.clock:+.0f} ms",
            f"{best[host] / 1e9:.2f} GB/s" if host in best else "-",
        )
    console.print(table)
    heard = [report for report in reports.values() if not report.error]
    if heard:
        same = {k: v for k, v in heard[0].versions.items() if all(other.versions.get(k) == v for other in heard)}
        console.print(Text("the same on all that answer: " + ", ".join(f"{k} {v}" for k, v in same.items())))
    if links is not None and "error" not in links:
        console.print(
            f"{links['world']} processes by {links['backend']}: all-reduce {links['all_reduce'] / 1e9:.2f} GB/s, "
            f"all-to-all {links['all_to_all'] / 1e9:.2f} GB/s, smallest all-reduce {1e6 * links['latency']:.0f} µs"
        )
    for problem in problems:
        console.print(Text(f"wrong   {problem.host + ': ' if problem.host else ''}{problem.text}"))
    console.print("These hosts can train together." if not problems else f"{len(problems)} wrong: see above.")


def _devices(report: Report) -> str:
    if not report.devices:
        return "none"
    return f"{len(report.devices)} x {report.devices[0]['name']}, {report.devices[0]['memory'] / GIB:.0f} GiB"
