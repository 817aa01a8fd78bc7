"""Images and containers without an engine: debootstrap makes a base, buildah builds on it and runs it, in a chroot.

What pip needs here (certificates, folders with wheels, other indices) is read from its settings when the test runs and
mounted while the image is built; the image does not hold it.

MOE_TRAIN_IMAGE_BASE          a folder with a root file system that debootstrap has made, instead of making one
MOE_TRAIN_IMAGE_TORCH         requirement of the torch to install (default: the version that the tests run with)
MOE_TRAIN_IMAGE_TORCH_INDEX   index that has it, where pip's settings do not lead to it
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
UID = 10001


def missing() -> list[str]:
    """What this machine lacks for building an image."""
    found = [] if os.geteuid() == 0 else ["root"]
    needed = ["buildah"] if os.environ.get("MOE_TRAIN_IMAGE_BASE") else ["buildah", "debootstrap"]
    return found + [name for name in needed if shutil.which(name) is None]


class Builder:
    """Images and containers below one folder. The caller calls close() at last: a store holds many gigabytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"BUILDAH_ISOLATION": "chroot", "XDG_RUNTIME_DIR": str(folder / "run")}
        (folder / "run").mkdir(parents=True)
        self._driver = "overlay"
        try:
            self("info")
        except AssertionError:  # a file system that cannot be the base of an overlay: slower, and larger
            self._driver = "vfs"

    def __call__(self, *arguments: object, timeout: float = 3600) -> str:
        """Runs buildah to its end; returns what it says."""
        result = subprocess.run(
            self.line(*arguments), env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        assert result.returncode == 0, f"{arguments}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result.stdout.strip()

    def line(self, *arguments: object) -> list[str]:
        store = [
            f"--root={self.folder / 'store'}",
            f"--runroot={self.folder / 'run'}",
            "--storage-driver",
            self._driver,
        ]
        return ["buildah", *store, *map(str, arguments)]

    def base(self, name: str) -> None:
        """A plain Debian with Python and nothing else, as an image."""
        given = os.environ.get("MOE_TRAIN_IMAGE_BASE")
        folder = Path(given) if given else self.folder / "base"
        if not given:
            line = ["debootstrap", "--variant=minbase", "--include=python3,ca-certificates", SUITE, str(folder)]
            result = subprocess.run(line, capture_output=True, text=True, timeout=1800)
            assert result.returncode == 0, result.stdout[-3000:]
        container = self("from", "scratch")
        self("add", "--quiet", container, folder, "/")
        # Published images have this too: no package may start its service while it is installed.
        policy = self.folder / "policy-rc.d"
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        self("copy", "--quiet", container, policy, "/usr/sbin/policy-rc.d")
        self("commit", "--quiet", "--rm", container, name)
        if not given:
            shutil.rmtree(folder)

    def build(self, name: str, base: str, *arguments: str) -> None:
        """docker/Dockerfile on a base."""
        self(
            *("bud", "--format", "docker", "--file", ROOT / "docker" / "Dockerfile", "--tag", name),
            *("--build-arg", f"BASE={base}", *arguments, *self.pip_mounts(), ROOT),
        )

    def pip_mounts(self) -> list[str]:
        """Options of buildah that give pip inside the settings and folders that it has here."""
        settings = pip_settings()
        path = self.folder / "pip.conf"
        path.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        mounts = {str(path): "/etc/pip.conf"}
        for value in " ".join(settings.values()).split():
            local = value.removeprefix("file://")
            if local.startswith("/") and Path(local).exists():
                # Pages of an index name files beside it.
                shown = Path(local).parent if value.startswith("file://") else Path(local)
                source = Path(local).resolve() if Path(local).is_file() else shown
                mounts[str(source)] = str(shown)
        return [word for source, place in mounts.items() for word in ("--volume", f"{source}:{place}:ro")]

    def config(self, image: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self("inspect", "--type", "image", image))["Docker"]["config"]
        return content

    def size(self, image: str) -> int:
        """Bytes."""
        content = json.loads(self("images", "--json", image))[0]["size"]
        number, unit = re.fullmatch(r"([\d.]+) ?([kMG]?B)", content).groups()  # type: ignore[union-attr]
        return int(float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit])

    def close(self) -> None:
        subprocess.run(self.line("rm", "--all"), env=self.environment, capture_output=True)
        subprocess.run(self.line("rmi", "--all", "--force"), env=self.environment, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


class Container:
    """Of an image, with folders for data and runs; several share this machine's network."""

    def __init__(self, builder: Builder, image: str, folder: Path, host: str) -> None:
        self.builder, self.host = builder, host
        self.name = builder("from", image)
        config = builder.config(image)
        self.entry, self.command = config["Entrypoint"], config["Cmd"]
        hosts = folder / "hosts"
        hosts.write_text("127.0.0.1 localhost node-0 node-1\n")
        self.options = ["--hostname", host, "--no-hosts", "--volume", f"{hosts}:/etc/hosts:ro"]
        for name in ("data", "runs"):
            (folder / name).mkdir(exist_ok=True)
            os.chown(folder / name, UID, 0)
            self.options += ["--volume", f"{folder / name}:/workspace/{name}"]

    def line(self, *arguments: str, entry: bool = True, **variables: object) -> list[str]:
        options = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
        start = [*self.entry, *(arguments or self.command)] if entry else list(arguments)
        return self.builder.line("run", *self.options, *options, self.name, "--", *start)

    def run(self, *arguments: str, **variables: object) -> subprocess.CompletedProcess[str]:
        """The entry point to its end, as docker run does it."""
        return subprocess.run(
            self.line(*arguments, **variables),
            env=self.builder.environment, capture_output=True, text=True, timeout=1800,
        )  # fmt: skip

    def start(self, log: Path, *arguments: str, **variables: object) -> Running:
        with log.open("w") as output:
            process = subprocess.Popen(
                self.line(*arguments, **variables), env=self.builder.environment, stdout=output, stderr=output
            )
        return Running(process, log)


class Running:
    """A container's processes, seen from outside."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def inside(self) -> list[psutil.Process]:
        """The first process of the container and all that it has started."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if process.name() == "tini":
                return [process, *process.children(recursive=True)]
        return []

    def signal(self, number: int) -> None:
        """To the first process, as `docker stop` does."""
        self.inside()[0].send_signal(number)

    def kill(self) -> None:
        """Everything at once, as when a machine is switched off."""
        for process in self.inside():
            process.kill()
        self.wait()

    def wait(self, seconds: float = 1800) -> int:
        return self.process.wait(timeout=seconds)

    def until(self, reached: Callable[[], bool], seconds: float = 1800) -> None:
        """Waits; AssertionError with the log where the container ends before, or it takes too long."""
        end = time.monotonic() + seconds
        while not reached():
            assert self.process.poll() is None, f"ended: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"not within {seconds:g} s: {self.log.read_text()[-3000:]}"
            time.sleep(0.3)


def pip_settings() -> dict[str, str]:
    """Those that hold here; what the environment says comes before files."""
    output = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found: dict[str, str] = {}
    for scope, name, value in re.findall(r"^(:env:|global|user|site)\.([\w-]+)='(.*)'$", output, re.MULTILINE):
        if scope == ":env:" or name not in found:
            found[name] = value
    return {name: found[name] for name in ("cert", "index-url", "extra-index-url", "find-links") if name in found}


def torch_arguments() -> list[str]:
    """Options of the build that install the torch that the tests run with."""
    wanted = os.environ.get("MOE_TRAIN_IMAGE_TORCH", f"torch=={torch.__version__}")
    index = os.environ.get("MOE_TRAIN_IMAGE_TORCH_INDEX", "")
    return ["--build-arg", f"TORCH={wanted}", "--build-arg", f"TORCH_INDEX={index}"]
