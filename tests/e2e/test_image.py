"""The image for the processor, really built and run: from a plain Debian, without an engine.

Takes about twenty minutes on two cores, and ten gigabytes; needs root, buildah, debootstrap and what apt and pip can
reach. image.py names the variables that change where things come from.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_train.launch.plan import free_port
from tests.e2e.image import ROOT, UID, Builder, Container, Running, missing, torch_arguments

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"NO IMAGE IS BUILT: missing here: {', '.join(missing())}"),
]
IMAGE = "localhost/moe-train:cpu"
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
SHORT = [
    "eval.every=1000",
    "schedule.warmup_steps=2",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "logging.every=1",
]
QUICK = {"MOE_TRAIN_DOCTOR": "0", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    found = Builder(tmp_path_factory.mktemp("image") / "store")
    try:
        found.base("localhost/base")
        found.build(IMAGE, "localhost/base", *torch_arguments())
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the data and the runs of all containers."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def nodes(builder: Builder, folder: Path) -> list[Container]:
    """Two, with the data that the compose file's first service makes."""
    found = [Container(builder, IMAGE, folder, f"node-{number}") for number in range(2)]
    made = found[0].run(*COMPOSE["data"]["command"])
    assert made.returncode == 0, made.stderr[-3000:]
    return found


def test_what_it_is(builder: Builder) -> None:
    config = builder.config(IMAGE)
    assert config["User"] == str(UID) and config["WorkingDir"] == "/workspace" and config["Cmd"] == ["doctor"]
    assert config["Healthcheck"]["Test"] == ["CMD", "moe-entrypoint", "live"]
    torch_size = sum(path.stat().st_size for path in Path(torch.__file__).parent.rglob("*") if path.is_file())
    # Its base, what the package needs and the tools are well below a gigabyte and a half beside torch.
    assert builder.size(IMAGE) < torch_size + 1.5e9
    assert "pip.conf" not in json.dumps(config)


def test_doctor_at_entry(nodes: list[Container]) -> None:
    result = nodes[0].run()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "two processes summed a tensor" in result.stdout and "missing" not in result.stdout


def test_the_user_may_write_what_is_its_own_only(nodes: list[Container]) -> None:
    script = (
        "id -u; touch /workspace/x ~/x runs/x && rm runs/x; test ! -w /opt/venv; test ! -w /usr/local/bin; ls /etc/ssh"
    )
    result = nodes[0].run("--", "sh", "-euc", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == str(UID)
    assert "host" not in result.stdout, "a host key that all containers would share"
    python = "import torch, moe_train; print(torch.__version__, moe_train.__file__)"
    version, place = nodes[0].run("--", "python", "-c", python).stdout.split()
    assert version == torch.__version__ and place.startswith("/opt/venv/")


def beats(run: Path, host: str) -> list[dict[str, Any]]:
    found = []
    for path in (run / "processes").glob("*.beat"):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return [beat for beat in found if beat["host"] == host]


def trains(run: Path, host: str, workers: int, step: int = 1, since: float = 0.0) -> bool:
    """Whether its workers do so now, and have taken so many steps. ``since``: what died before left its beats."""
    recent = max(since, time.time() - 5)
    living = [beat for beat in beats(run, host) if beat["time"] > recent and beat["phase"] == "train"]
    return len(living) >= workers and all(beat["step"] >= step for beat in living)


def test_one_node_dies_stops_and_finishes(nodes: list[Container], folder: Path) -> None:
    node, run = nodes[0], folder / "runs" / "one"
    train = ["deepspeed", "train", "demo", "name=one", "--resume", "auto", *SHORT]
    variables = QUICK | {"MOE_TRAIN_PROCESSES": "2", "MOE_TRAIN_RUN_DIR": "runs/one", "MASTER_PORT": free_port()}

    def live(seconds: int) -> int:
        return node.run("live", MOE_TRAIN_RUN_DIR="runs/one", MOE_TRAIN_LIVE_SECONDS=seconds).returncode

    def begin(log: str, *more: str) -> Running:
        return node.start(folder / log, *train, *more, **variables)

    assert live(60) == 1, "nothing runs yet"
    first = begin("first.log", "train.steps=1000")
    first.until(lambda: trains(run, "node-0", 2))
    assert live(60) == 0
    first.kill()
    time.sleep(3)
    assert live(2) == 1, "what died left its files, which grow old"
    killed = time.time()
    second = begin("second.log", "train.steps=1000")
    second.until(lambda: trains(run, "node-0", 2, step=2, since=killed))
    second.signal(signal.SIGTERM)
    assert second.wait() == 128 + signal.SIGTERM, second.log.read_text()[-3000:]
    saved = saved_step(run)
    assert 2 <= saved < 1000
    third = begin("third.log", f"train.steps={saved + 2}")
    assert third.wait() == 0, third.log.read_text()[-3000:]
    assert saved_step(run) == saved + 2
    assert all(path.stat().st_uid == UID for path in run.rglob("*"))


def saved_step(run: Path) -> int:
    return int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))


def test_two_nodes_of_the_compose_file(nodes: list[Container], folder: Path) -> None:
    """Its commands and variables as they stand; both share one network here, where each would have its own."""
    port = free_port()
    running = []
    for node in nodes:
        service = COMPOSE[node.host]
        variables = service["environment"] | {"MASTER_PORT": port} | QUICK
        command = [*service["command"], *SHORT, "train.steps=3"]
        running.append(node.start(folder / f"{node.host}.log", *command, **variables))
    codes = [node.wait() for node in running]
    logs = [node.log.read_text() for node in running]
    assert codes == [0, 0], "\n".join(log[-3000:] for log in logs)
    run = folder / COMPOSE["node-0"]["environment"]["MOE_TRAIN_RUN_DIR"]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["processes"] == 2 and environment["hosts"] == 2
    assert saved_step(run) == 3
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "grad_norm" in record or "loss" in record][-1] == 3


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="NO SSH IN THE IMAGE IS TESTED: no ssh-keygen here")
def test_ssh_between_containers(nodes: list[Container], folder: Path) -> None:
    """As user of the image, on a high port, with keys that are mounted: what DeepSpeed's launcher needs."""
    keys = folder / "runs" / "keys"
    keys.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / "id")], check=True)
    (keys / "id.pub").rename(keys / "authorized_keys")
    for path in [keys, *keys.iterdir()]:
        os.chown(path, UID, 0)
    variables = {"MOE_TRAIN_SSH_KEYS": "/workspace/runs/keys", "MOE_TRAIN_SSH_PORT": free_port()}
    server = nodes[1].start(folder / "sshd.log", "sshd", **variables)
    try:
        server.until(lambda: "listening" in server.log.read_text())
        functions = (ROOT / "docker" / "entrypoint.sh").read_text().split("[ $# -gt 0 ]")[0]
        script = functions + "\nprepare_ssh\nexec < /dev/null\n"
        # The script is read as a whole before the redirection takes its rest away.
        script = f"main() {{\n{script}pdsh -R ssh -w node-1 moe-train --version\n}}\nmain\n"
        result = subprocess.run(
            nodes[0].line("sh", "-eu", "-s", entry=False, **variables),
            env=nodes[0].builder.environment, input=script, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.stdout.startswith("node-1: moe-train "), result.stderr + server.log.read_text()
    finally:
        server.kill()


def test_a_torch_of_the_base_stays(builder: Builder) -> None:
    """As on an image with CUDA: nothing is installed over what is there."""
    container = builder("from", "localhost/base")
    torch_line = torch_arguments()[1].removeprefix("TORCH=")
    script = f"apt-get update && apt-get install -y --no-install-recommends python3-pip && pip install {torch_line}"
    script += " --no-cache-dir --break-system-packages && python3 -c 'import torch; print(torch.__file__)'"
    mounts = builder.pip_mounts()
    place = builder("run", "--user", "0", *mounts, container, "--", "sh", "-euc", script).splitlines()[-1]
    assert "/usr/local/" in place
    builder("commit", "--quiet", "--rm", container, "localhost/with-torch")
    builder.build("localhost/dependencies", "localhost/with-torch", "--target", "dependencies")
    container = builder("from", "localhost/dependencies")
    script = "import torch, deepspeed, sys; print(torch.__file__, torch.__version__, sys.prefix)"
    line = ["/opt/venv/bin/python", "-c", script]
    output = builder("run", "--env", "DS_ACCELERATOR=cpu", container, "--", *line).splitlines()[-1]
    assert output.split() == [place, torch.__version__, "/opt/venv"]
    packages = builder("run", container, "--", "ls", "/opt/venv/lib/python3.11/site-packages").split()
    assert "deepspeed" in packages and "torch" not in packages
    assert not any(name.startswith("nvidia") for name in packages)
