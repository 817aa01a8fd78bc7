"""Runs over two machines (namespaces of this one): through ssh and pdsh, by torchrun's agents, and without a cable."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moe_train.checkpoint import store
from moe_train.checkpoint.reading import StoredTensors
from tests.e2e.conftest import moe_train, overrides
from tests.e2e.namespaces import Cluster, cluster, missing

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


def test_the_cable_is_pulled(machines: Cluster, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """One command on one machine starts both; its run ends, waits for the other machine and finishes with the same
    bits. The run's name is one that a shell would read.
    """
    run = tmp_path / "a b;touch owned;$(touch owned)`touch owned`'\" %h"
    hosts = machines.hostfile(tmp_path / "hosts")
    log = tmp_path / "log"
    line = train(*settings(data), "--hostfile", hosts, "--run-dir", run, "--max-restarts", 3)
    command = machines[0].line(*line)
    process = subprocess.Popen(
        command, env=machines[0].environment, stdout=log.open("w"), stderr=subprocess.STDOUT, cwd=Path.cwd()
    )
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
        process.kill()
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
