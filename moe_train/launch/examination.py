"""The hosts of a launch before a run: each one's facts, what they see of each other, how fast they exchange data."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from moe_train.launch import bandwidth
from moe_train.launch.conversation import OTHER_VERSION, Conversation, HostError
from moe_train.launch.environment import remote_variables, ssh_options, worker_environment
from moe_train.launch.hosts import THIS_MACHINE, environment_file
from moe_train.launch.judgement import Report
from moe_train.launch.plan import LaunchOptions, command
from moe_train.launch.remote import RemoteHosts, ssh

LINK_SECONDS = 300.0
_VISIBLE_WITHIN = 10.0
_SET_VARIABLES = (
    "import json, os, sys; first = open(0, 'rb', 0, closefd=False).readline(); "
    "os.environ.update(json.loads(first)); os.execv(sys.argv[1], sys.argv[1:])"
)
"""Becomes the process that answers, with the variables in the first line of its input: on a command line everybody on
these machines could read them. Without a buffer, which would keep what comes after that line."""
T = TypeVar("T")


def examine_hosts(options: LaunchOptions, run_dir: Path, environment: Mapping[str, str]) -> dict[str, Report]:
    """What each host of the hostfile says of itself. Leaves nothing behind in the run folder."""
    variables = remote_variables(environment, (Path.home(), Path()))
    token = uuid.uuid4().hex[:12]
    paths = {host: str(run_dir.absolute() / f".doctor.{token}.{number}") for number, host in enumerate(options.slots)}
    with ExitStack() as stack, ThreadPoolExecutor(max_workers=len(paths)) as pool:
        talks = {host: stack.enter_context(_talk(host, variables)) for host in paths}

        def everywhere(ask: Callable[[str, Conversation], T], hosts: Mapping[str, Conversation]) -> dict[str, T]:
            return dict(zip(hosts, pool.map(lambda host: ask(host, hosts[host]), hosts), strict=True))

        reports = everywhere(lambda host, talk: _facts(talk, run_dir), talks)
        heard = {host: talk for host, talk in talks.items() if not reports[host].error}
        try:
            errors = everywhere(lambda host, talk: _try(talk, "write", path=paths[host]), heard)
            writers = [host for host in heard if not errors[host]]
            seen = everywhere(lambda host, talk: _seen(talk, {other: paths[other] for other in writers}), heard)
        finally:
            everywhere(lambda host, talk: _try(talk, "remove", path=paths[host]), heard)
    return {
        host: replace(report, sees=seen.get(host, frozenset()), disk_error=errors.get(host, ""))
        for host, report in reports.items()
    }


def _talk(host: str, variables: Mapping[str, str]) -> Conversation:
    words = [sys.executable, "-u", "-m", "moe_train.launch.facts"]
    if host in THIS_MACHINE:
        return Conversation(words, {**os.environ, **variables})
    here = os.path.abspath(".")
    line = ssh(host, [sys.executable, "-c", _SET_VARIABLES, *words])
    # Relative paths mean the same as here, as they do in a run.
    line[-1] = f"cd {shlex.quote(here)} && exec {line[-1]}"
    return Conversation(line, first_line=json.dumps(dict(variables)))


def _facts(talk: Conversation, run_dir: Path) -> Report:
    try:
        found = Report(**talk.ask("facts", folder=str(run_dir)))
        offset, doubt = talk.clock()
    except (TypeError, ValueError):  # other facts than ours, or none
        return Report(error=OTHER_VERSION)
    except HostError as error:
        return Report(error=str(error))
    return replace(found, clock=offset, clock_doubt=doubt)


def _try(talk: Conversation, do: str, **more: Any) -> str:
    try:
        talk.ask(do, **more)
        return ""
    except HostError as error:
        return str(error)


def _seen(talk: Conversation, paths: Mapping[str, str]) -> frozenset[str]:
    try:
        there = talk.ask("look", paths=list(paths.values()), within=_VISIBLE_WITHIN)
    except HostError:
        return frozenset()
    return frozenset(host for host, is_there in zip(paths, there, strict=True) if is_there)


def try_links(options: LaunchOptions, environment: Mapping[str, str], seconds: float = LINK_SECONDS) -> dict[str, Any]:
    """What bandwidth.py measures on all slots of the hostfile, started as a run is; {"error": why} where it fails."""
    environment = worker_environment(options, environment, cpu=environment.get("DS_ACCELERATOR", "") == "cpu")
    launch = uuid.uuid4().hex[:12]
    module = bandwidth.__name__
    with tempfile.TemporaryDirectory(prefix="moe-train-") as scratch:
        if options.by_ssh:
            file = Path(scratch) / "environment"
            file.write_text(environment_file(remote_variables(environment, (Path.home(), Path()))), encoding="utf-8")
            environment |= {"DS_ENV_FILE": str(file), "PDSH_SSH_ARGS_APPEND": ssh_options(environment)}
        line = command(options, ["--name", launch], scratch=Path(scratch), environment=environment, module=module)
        try:
            code, out, err = _run(line, environment, seconds)
        finally:
            if options.by_ssh:
                RemoteHosts(tuple(options.slots)).sweep([launch])
    # pdsh writes the host before each line.
    found = [line.partition(bandwidth.MARK)[2] for line in out.splitlines() if bandwidth.MARK in line]
    if found:
        return dict(json.loads(found[0]))
    lines = f"{out}\n{err}".strip().splitlines()
    said = [line for line in lines if "Error" in line] or lines
    reason = f"the processes did not finish within {seconds:g} s" if code is None else f"exit code {code}"
    return {"error": f"{reason}: {said[-1].strip()}" if said else reason}


def _run(line: list[str], environment: Mapping[str, str], seconds: float) -> tuple[int | None, str, str]:
    """Exit code (None: it took too long), stdout and stderr; nothing that it started stays behind on this machine."""
    process = subprocess.Popen(
        line, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    code = None
    try:
        out, err = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return code, out, err
