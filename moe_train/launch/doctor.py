"""What a machine has for training, whether it works, and what to do about what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_train.launch.environment import available_cores
from moe_train.launch.plan import free_port

State = Literal["ok", "note", "missing"]
GROUP_SECONDS = 90.0
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    name: str
    state: State
    """note: works without it; missing: training does not."""
    text: str
    advice: str = ""


def examine() -> Iterable[Finding]:
    """All findings, the quick ones first."""
    checks: tuple[Callable[[], Iterable[Finding]], ...] = (
        _python, _packages, _compiler, _accelerator, _memory, _disk, _tools, _process_group,
    )  # fmt: skip
    for check in checks:
        yield from check()


def _python() -> Iterable[Finding]:
    version = platform.python_version()
    if (3, 11) <= sys.version_info < (3, 13):
        yield Finding("python", "ok", f"{version} at {sys.executable}")
    else:
        yield Finding("python", "missing", version, "use Python 3.11 or 3.12: make test PYTHON=python3.11")


def _packages() -> Iterable[Finding]:
    """Every dependency that the installed package declares, against its version range."""
    from packaging.requirements import Requirement

    try:
        declared = importlib.metadata.requires("moe-train") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("moe-train", "missing", "not installed, its dependencies are unknown", "pip install -e .")
        return
    fulfilled: set[str] = set()
    for requirement in map(Requirement, declared):
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if not optional:
                yield Finding(requirement.name, "missing", "not installed", f"pip install '{wanted}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            # Several extras may name the same package.
            if requirement.name not in fulfilled:
                yield Finding(requirement.name, "ok", version)
            fulfilled.add(requirement.name)
        else:
            state: State = "note" if optional else "missing"
            yield Finding(requirement.name, state, f"{version}, wanted {wanted}", f"pip install '{wanted}'")


def _compiler() -> Iterable[Finding]:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found:
        yield Finding("compiler", "ok", found)
    else:
        yield Finding(
            "compiler", "note", "no C++ compiler",
            "only DeepSpeed's own kernels (CPU Adam, offload) need one: install g++",
        )  # fmt: skip


def _accelerator() -> Iterable[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            yield Finding(f"accelerator {index}", "ok", f"{facts.name}, {facts.total_memory / GIB:.0f} GiB")
    elif torch.version.cuda and shutil.which("nvidia-smi"):
        yield Finding(
            "accelerator", "note", f"torch is built for CUDA {torch.version.cuda} but finds no device",
            "compare the driver's version (nvidia-smi) with torch's, and see CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    else:
        yield Finding("accelerator", "ok", f"none; training runs on {available_cores()} processor cores in float32")


def _memory() -> Iterable[Finding]:
    if importlib.util.find_spec("psutil") is None:
        return
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < 4 * GIB:
        yield Finding("memory", "note", text, "make demo needs about 4 GiB")
    else:
        yield Finding("memory", "ok", text)


def _disk() -> Iterable[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / GIB:.1f} GiB free in {Path.cwd()}"
    if free < 2 * GIB:
        yield Finding("disk", "note", text, "a checkpoint takes 12 to 16 bytes per parameter")
    else:
        yield Finding("disk", "ok", text)


def _tools() -> Iterable[Finding]:
    for tool, purpose in (
        ("pdsh", "only needed by --hostfile, which starts workers on other machines through ssh"),
        ("numactl", "only needed to bind workers to cores by DeepSpeed's own --bind_cores_to_rank"),
    ):
        path = shutil.which(tool)
        if path:
            yield Finding(tool, "ok", path)
        else:
            yield Finding(tool, "note", "not installed", f"{purpose}; install the system package {tool}")


def _process_group() -> Iterable[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    error = try_process_group()
    if error is None:
        yield Finding("process group", "ok", "two processes summed a tensor over gloo")
    else:
        yield Finding(
            "process group", "missing", error,
            "often the host name does not resolve to an address of this machine: set GLOO_SOCKET_IFNAME to its network "
            "interface (lo for one machine) and try again",
        )  # fmt: skip


def try_process_group(seconds: float = GROUP_SECONDS) -> str | None:
    """Starts two processes that sum a tensor over gloo; None if it worked within the time, else why not."""
    environment = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE="2")
    with tempfile.TemporaryFile("w+") as output:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "moe_train.launch.probe"],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=output,
            )
            for rank in range(2)
        ]
        try:
            codes = [process.wait(timeout=seconds) for process in processes]
        except subprocess.TimeoutExpired:
            return f"two processes did not find each other within {seconds:g} s"
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if not any(codes):
            return None
        output.seek(0)
        lines = output.read().strip().splitlines()
        return lines[-1] if lines else f"exit codes {codes}"
