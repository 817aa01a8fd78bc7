"""Machines in one machine: each has its own network, host name, processes and sshd, and a cable to a common switch.

The disk is common, which a test may hide from one of them. Needs root and a kernel that lets it make namespaces.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NEEDED = {
    "unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "sshd": "openssh-server",
    "ssh": "openssh-client", "ssh-keygen": "openssh-client", "pdsh": "pdsh", "pkill": "procps",
}  # fmt: skip
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def missing() -> str:
    """What keeps such machines from running here; empty if nothing does."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "root on Linux"
    packages = sorted({package for tool, package in NEEDED.items() if shutil.which(tool, path=_PATH) is None})
    if packages:
        return "the system packages " + ", ".join(packages)
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "true"], capture_output=True
    )
    return "" if tried.returncode == 0 else f"a kernel that makes namespaces: {tried.stderr.decode().strip()}"


@dataclass
class Machine:
    address: str
    init: subprocess.Popen[bytes]
    process: int
    """Its first process, as numbered outside."""
    environment: dict[str, str]

    def line(self, *words: object) -> list[str]:
        """A command line that runs the words on this machine."""
        inside = ["-t", str(self.process), "-n", "-u", "-p", "-m", "--wd=" + os.getcwd()]
        return ["nsenter", *inside, "--", *map(str, words)]

    def run(self, *words: object, timeout: float = 300, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            self.line(*words), env=self.environment, capture_output=True, text=True, timeout=timeout, **options
        )

    def clear(self) -> None:
        """Kills everything of ours; who started it from outside does not reach it."""
        self.run("pkill", "-KILL", "-f", "[m]oe_train|[d]eepspeed.launcher")

    def cable(self, state: str) -> None:
        """Puts it in ("up") or pulls it ("down")."""
        self.run("ip", "link", "set", "eth0", state, check=True)


@dataclass
class Cluster:
    machines: list[Machine] = field(default_factory=list)

    def __getitem__(self, number: int) -> Machine:
        return self.machines[number]

    def hostfile(self, path: Path, slots: int = 1, order: tuple[int, ...] | None = None) -> Path:
        chosen = [self.machines[number] for number in order] if order else self.machines
        path.write_text("".join(f"{machine.address} slots={slots}\n" for machine in chosen))
        return path


@contextmanager
def cluster(folder: Path, count: int = 2, subnet: str = "10.77.0") -> Iterator[Cluster]:
    """So many machines, which reach each other by ssh without a password; gone at the end, with all that runs there.

    The first holds the switch's end of all cables, so only two machines are joined directly.
    """
    assert count == 2, "one cable"
    ssh_config = _keys(folder)
    environment = _environment(folder, ssh_config)
    made = Cluster()
    try:
        for number in range(count):
            made.machines.append(_boot(folder, f"node-{number + 1}", f"{subnet}.{number + 1}", environment))
        first, second = made.machines
        subprocess.run(
            ["ip", "link", "add", "eth0", "netns", str(first.process), "type", "veth",
             "peer", "name", "eth0", "netns", str(second.process)],
            check=True,
        )  # fmt: skip
        for machine in made.machines:
            machine.run("ip", "address", "add", f"{machine.address}/24", "dev", "eth0", check=True)
            machine.run("ip", "link", "set", "lo", "up", check=True)
            machine.cable("up")
        for machine in made.machines:
            for other in made.machines:
                _wait_for_ssh(machine, other)
        yield made
    finally:
        for machine in made.machines:
            machine.init.kill()  # and with it, by --kill-child, whatever runs there
            machine.init.wait()


def _keys(folder: Path) -> Path:
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    config = folder / "ssh_config"
    lines = ["Host *", f"IdentityFile {folder / 'user_key'}", "IdentitiesOnly yes", "LogLevel ERROR"]
    lines += ["StrictHostKeyChecking no", f"UserKnownHostsFile {folder / 'known_hosts'}"]
    config.write_text("\n".join(lines) + "\n")
    return config


def _environment(folder: Path, ssh_config: Path) -> dict[str, str]:
    """With an ssh that reads our configuration: what starts it takes the first on the path."""
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {ssh_config} "$@"\n')
    wrapper.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{wrapper.parent}{os.pathsep}{_PATH}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
    }


def _boot(folder: Path, name: str, address: str, environment: dict[str, str]) -> Machine:
    # The address comes with the cable, a little later.
    script = (
        'mount -t tmpfs tmpfs /run && mkdir /run/sshd && hostname "$1" && until ip -4 -o address show eth0 2>/dev/null '
        '| grep -q inet; do sleep 0.05; done; exec "$2" -D -e -f /dev/null -h "$3" -o ListenAddress="$4" '
        '-o AuthorizedKeysFile="$5" -o StrictModes=no -o UsePAM=no -o PidFile=none -o LogLevel=ERROR'
    )
    words = [name, shutil.which("sshd", path=_PATH), folder / "host_key", address, folder / "authorized_keys"]
    init = subprocess.Popen(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script,
         "sh", *map(str, words)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=(folder / f"{name}.log").open("w"),
    )  # fmt: skip
    children = Path(f"/proc/{init.pid}/task/{init.pid}/children")
    deadline = time.monotonic() + 30
    while not (found := children.read_text().split()):
        assert time.monotonic() < deadline and init.poll() is None, (folder / f"{name}.log").read_text()
        time.sleep(0.02)
    return Machine(address, init, int(found[0]), environment)


def _wait_for_ssh(machine: Machine, other: Machine) -> None:
    deadline = time.monotonic() + 60
    while (result := machine.run("ssh", other.address, "true")).returncode:
        assert time.monotonic() < deadline, result.stderr
        time.sleep(0.2)
