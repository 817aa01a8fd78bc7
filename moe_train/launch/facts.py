"""``python -m moe_train.launch.facts``: answers questions about the machine that it runs on, a line of JSON each.

The doctor starts it on every host of a launch. It reads a request from stdin, {"do": name, ...}, and writes a line that
begins with MARK; whatever else a login shell or a library prints is not taken for an answer.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

MARK = "moe-train-doctor:"
PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "moe-train")


def versions() -> dict[str, str]:
    """What must be the same on all hosts; what cannot be found is "missing"."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    found["moe-train's files"] = digest(Path(__file__).resolve().parents[1])
    return found | _cuda()


def digest(folder: Path) -> str:
    """Of the names and contents of the Python files below a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def _cuda() -> dict[str, str]:
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    found = {"CUDA": torch.version.cuda or torch.version.hip or "unknown"}
    try:
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    except (AttributeError, RuntimeError):
        pass
    if shutil.which("nvidia-smi"):
        line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        result = subprocess.run(line, capture_output=True, text=True, timeout=60)
        found["driver"] = next(iter(result.stdout.split()), "unknown")
    return found


def devices() -> list[dict[str, Any]]:
    """Name and memory (bytes) of each accelerator that a worker of this machine would see."""
    if os.environ.get("DS_ACCELERATOR", "").lower() == "cpu":
        return []
    try:
        import torch
    except ImportError:
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": device.name, "memory": device.total_memory} for device in found]


def facts(run_dir: Path) -> dict[str, Any]:
    """Everything that takes no other machine to find out; sizes in bytes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    there = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.is_dir())
    return {
        "name": socket.gethostname(),
        "versions": versions(),
        "devices": devices(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory,
        "disk_free": shutil.disk_usage(there).free,
    }


def answer(request: dict[str, Any]) -> Any:
    """What a request asks for; OSError where the disk refuses."""
    match request["do"]:
        case "facts":
            return facts(Path(request["folder"]))
        case "clock":
            return time.time()
        case "write":
            path = Path(request["path"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            return None
        case "look":
            # A network file system may take a while to show what another machine has written.
            wanted, deadline = [Path(path) for path in request["paths"]], time.monotonic() + request["within"]
            while not all(path.exists() for path in wanted) and time.monotonic() < deadline:
                time.sleep(0.1)
            return [path.exists() for path in wanted]
        case "remove":
            path = Path(request["path"])
            path.unlink(missing_ok=True)
            with suppress(OSError):
                path.parent.rmdir()  # if nothing else is in it
            return None
    raise ValueError(f"unknown request {request['do']}")


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            reply = {"value": answer(json.loads(line))}
        except Exception as error:  # whatever it is, the doctor asks on
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(MARK + json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
