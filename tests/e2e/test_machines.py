"""Runs over two machines (namespaces of this one): through ssh and pdsh, by torchrun's agents, and without a cable."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_train.checkpoint import store
from moe_train.checkpoint.reading import StoredTensors
from tests.e2e.conftest import moe_train, overrides
from tests.e2e.namespaces import Cluster, Machine, cluster, missing

pytestmark = pytest.mark.slow
STEPS, EVERY = 40, 5


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(f"NOT TESTED: runs over two machines need {reason}")
    with cluster(tmp_path_factory.mktemp("machines")) as made:
        yield made


def settings(data: Path) -> list[str]:
    return overrides(
        data,
        *(f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}", "eval.every=0", "parallel.expert=2"),
        *("train.global_batch_size=4", "train.micro_batch_size=1", "parallel.timeout_seconds=20"),
        *("router.balancing.bias.rate=0.01", "logging.every=1"),
    )


def losses(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]


def contents(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint."""
    directory = store.latest(run / "checkpoints")
    assert directory is not None and directory.name.endswith(f"{STEPS:08d}")
    found = {}
    with StoredTensors(directory) as stored:
        for key, shape in stored.shapes.items():
            found[key] = torch.empty(shape, dtype=stored.dtypes[key])
            stored.read(key, (0,) * len(shape), found[key])
    return found


def assert_same_run(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    one, two = contents(run), contents(other)
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one machine, with the same layout."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    result = moe_train("train", "tiny", *settings(data), "--processes", 2, "--run-dir", run)
    assert result.returncode == 0, result.stderr[-3000:]
    return run


def train(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "moe_train", "train", "tiny", *arguments]


def wait_until(condition: Callable[[], object], process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, f"nothing within {seconds} s:\n{log.read_text()[-4000:]}"
        time.sleep(0.1)


def saved(run: Path) -> int:
    try:
        return int((run / "checkpoints" / store.LATEST).read_text().removeprefix(store.STEP))
    except (OSError, ValueError):
        return -1


def started(machine: Machine, line: list[object], log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        machine.line(*line), env=machine.environment, stdout=log.open("w"), stderr=subprocess.STDOUT
    )


def clear(machines: Cluster, *processes: subprocess.Popen[bytes]) -> None:
    """Nothing of a test that has failed disturbs the next one; what has ended by itself must have left nothing."""
    if any(process.poll() is None for process in processes):
        for machine in machines.machines:
            machine.clear()
    for process in processes:
        process.kill()
        process.wait()


def test_the_cable_is_pulled(machines: Cluster, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """One command on one machine starts both; its run ends, waits for the other machine and finishes with the same
    bits. The run's name is one that a shell would read.
    """
    run = tmp_path / "a b;touch owned;$(touch owned)`touch owned`'\" %h"
    hosts = machines.hostfile(tmp_path / "hosts")
    log = tmp_path / "log"
    line = train(*settings(data), "--hostfile", hosts, "--run-dir", run, "--max-restarts", 3)
    process = started(machines[0], line, log)
    try:
        wait_until(lambda: saved(run) >= 2 * EVERY, process, log, 1200)
        machines[1].cable("down")
        pulled = time.monotonic()
        wait_until(lambda: "waiting for hosts that do not answer" in log.read_text(), process, log, 300)
        print(f"noticed after {time.monotonic() - pulled:.0f} s")
        machines[1].cable("up")
        code = process.wait(timeout=1800)
    finally:
        machines[1].cable("up")
        clear(machines, process)
    assert code == 0, log.read_text()[-4000:]
    text = log.read_text()
    assert "restart 1 of at most 3, from step" in text and "ended with exit code 0 after 1 restarts" in text, text[
        -4000:
    ]
    assert_same_run(run, undisturbed)
    environment = json.loads((run / "environment.json").read_text())
    assert (environment["hosts"], environment["processes"]) == (2, 2)
    assert not list(tmp_path.rglob("owned")) and not Path("owned").exists()
    for machine in machines.machines:
        assert "moe_train" not in machine.run("ps", "ax").stdout


def test_agents_start_a_run_again_together(machines: Cluster, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A command on each machine, and no process above both: a worker of the second is killed."""
    run = tmp_path / "run"
    line = train(*settings(data), "--run-dir", run, "--launcher", "torchrun", "--no-ssh", "--num-nodes", 2)
    line += ["--processes", 1, "--master-addr", machines[0].address, "--max-restarts", 3]
    logs = [tmp_path / "log_0", tmp_path / "log_1"]
    nodes = [started(machines[rank], [*line, "--node-rank", rank], logs[rank]) for rank in range(2)]
    try:
        wait_until(lambda: saved(run) >= 2 * EVERY, nodes[0], logs[0], 1200)
        machines[1].run("pkill", "-KILL", "-f", "--", " -m moe_train[.]training", check=True)
        killed = time.monotonic()
        # In the log of whichever agent got rank 0.
        wait_until(lambda: any("resuming tiny" in log.read_text() for log in logs), nodes[0], logs[0], 600)
        print(f"resumed after {time.monotonic() - killed:.0f} s")
        codes = [node.wait(timeout=1800) for node in nodes]
    finally:
        clear(machines, *nodes)
    assert codes == [0, 0], [log.read_text()[-3000:] for log in logs]
    assert_same_run(run, undisturbed)


def test_workers_of_other_machines_save_when_the_run_is_stopped(machines: Cluster, data: Path, tmp_path: Path) -> None:
    """No worker is where the command is; and a host that does not answer is told before anything starts."""
    run, log = tmp_path / "run", tmp_path / "log"
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{machines[1].address} slots=2\n10.77.0.9 slots=1\n")
    line = train(*settings(data), "train.steps=100000", "--hostfile", hosts, "--run-dir", run)
    refused = machines[0].run(*line, "--include", f"{machines[1].address}:0@10.77.0.9", timeout=600)
    assert refused.returncode == 2 and "10.77.0.9: ssh: connect" in refused.stderr, refused.stderr
    assert machines[1].address + ":" not in refused.stderr and not run.exists()
    process = started(machines[0], [*line, "--exclude", "10.77.0.9"], log)
    try:
        wait_until(lambda: saved(run) >= EVERY, process, log, 1200)
        machines[0].run("pkill", "-TERM", "-f", "[m]oe_train train tiny", check=True)
        assert process.wait(timeout=600) == 143, log.read_text()[-3000:]
    finally:
        clear(machines, process)
    assert saved(run) > EVERY and losses(run)[-1][0] == saved(run)
    assert "moe_train" not in machines[1].run("ps", "ax").stdout


def doctor(machines: Cluster, *arguments: object) -> tuple[int, dict[str, Any]]:
    line = [sys.executable, "-m", "moe_train", "doctor", "--json", *arguments]
    result = machines[0].run(*line, timeout=1200)
    assert result.stdout, result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout)
    return result.returncode, found


def test_the_doctor_sees_both(machines: Cluster, tmp_path: Path) -> None:
    hosts = machines.hostfile(tmp_path / "hosts")
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "kept").touch()
    first, second = (machine.address for machine in machines.machines)
    code, found = doctor(machines, "--hostfile", hosts, "--run-dir", runs)
    assert (code, found["ok"], found["problems"]) == (0, True, []), found
    assert [found["hosts"][host]["name"] for host in (first, second)] == ["node-1", "node-2"]
    assert all(abs(host["clock"]) < host["clock_doubt"] + 0.5 for host in found["hosts"].values())
    assert found["links"]["world"] == 2 and found["links"]["backend"] == "gloo"
    ((low, high, rate),) = found["links"]["pairs"]
    assert (low, high) == (0, 1) and rate > 1e6 and found["links"]["all_to_all"] > 1e6
    assert [path.name for path in runs.iterdir()] == ["kept"]
    machines[1].run("mount", "-t", "tmpfs", "tmpfs", runs, check=True)
    try:
        hosts.write_text(hosts.read_text() + "10.77.0.9 slots=1\n")
        code, found = doctor(machines, "--hostfile", hosts, "--run-dir", runs)
    finally:
        machines[1].run("umount", runs)
    assert code == 1 and found["links"] is None
    problems = {problem["host"]: problem["text"] for problem in found["problems"]}
    assert problems.keys() == {"10.77.0.9", ""}, problems
    assert "connect" in problems["10.77.0.9"] and "not on a disk that all share" in problems[""]
