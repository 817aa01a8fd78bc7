"""environment.json: what a run was made with. Reads no environment variable, so that no secret can end up in it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_train.data.files import write_atomically

ENVIRONMENT = "environment.json"
PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy", "transformers", "sentencepiece", "pyarrow", "triton")
_TOKEN = r"(?:auth|access|bearer|secret|hf|hub|gh|github|wandb)[_-]?token"
_NAME = rf"[\w.-]*(?:api[_-]?key|secret|passw(?:or)?d|credential|{_TOKEN})[\w.-]*"
_SECRET = re.compile(rf"(?i)({_NAME}|^--?token)([=:]).*")
_SECRET_FLAG = re.compile(rf"(?i)-{_NAME}|--?token")
_IN_ADDRESS = re.compile(r"(\w://)[^/@\s]+@")
"""Name and password before the host of a URL."""


def environment(*, processes: int, hosts: int = 1, model: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Versions, device, commit, command line. ``model``: facts such as total_parameters, active_parameters and
    flops_per_token. What cannot be found out is None."""
    from moe_train import __version__

    return {
        "moe_train": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": without_secrets(sys.argv),
        "commit": git_commit(Path(__file__).resolve().parents[2]),
        "processes": processes,
        "hosts": hosts,
        "packages": {name: _version(name) for name in PACKAGES},
        **device_facts(),
        "model": dict(model or {}),
    }


def versions() -> dict[str, str | None]:
    """Of this package, Python and the libraries that compute; None where one is not installed."""
    from moe_train import __version__

    own = {"moe_train": __version__, "python": platform.python_version()}
    return own | {name: _version(name) for name in PACKAGES}


def write_environment(run_dir: Path, content: Mapping[str, Any]) -> None:
    """Writes <run_dir>/environment.json; that of an earlier start of the same run is kept under "earlier"."""
    path = run_dir / ENVIRONMENT
    content = dict(content)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        content["earlier"] = [*before.pop("earlier", []), before]
    except (OSError, ValueError):
        pass
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def device_facts() -> dict[str, Any]:
    """Name and number of the accelerators that this process sees, or the processor's name."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "device": properties.name,
            "device_memory_bytes": properties.total_memory,
            "visible_devices": torch.cuda.device_count(),
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return {"device": f"cpu: {_processor()}", "threads": torch.get_num_threads()}


def git_commit(folder: Path) -> str | None:
    """Commit of the checkout that holds the package, with "+changes" when tracked files differ; None when installed
    from a wheel or without git."""
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """The command line with the values of arguments that look like credentials replaced by ***."""
    cleaned: list[str] = []
    hide_next = False
    for argument in arguments:
        shown = _SECRET.sub(r"\1\2***", _IN_ADDRESS.sub(r"\1***@", argument))
        cleaned.append("***" if hide_next else shown)
        hide_next = bool(_SECRET_FLAG.fullmatch(argument))
    return cleaned


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
