"""Commands that the templates and pages show: each is one that is taken, with the processes that it starts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_train.training.run_config import check, load_run_config
from tests.reference.command_line import parse

ROOT = Path(__file__).resolve().parents[3]
SLURM = ROOT / "launcher" / "slurm"
PAGES = [ROOT / "docs" / "cluster.md", ROOT / "docs" / "docker.md"]
SLOTS = 8
"""Of a node where the command does not say it, as in the hostfile that docs/cluster.md shows."""


def commands() -> Iterator[tuple[str, list[str]]]:
    """(file, words) of what starts a training, from the heads of the job scripts and from blocks of the pages."""
    for path in sorted(SLURM.glob("*.sbatch")):
        yield from _in(path, re.sub("^#", "", path.read_text(), flags=re.MULTILINE), indent=" {3,}")
    for path in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            yield from _in(path, block, indent="(?:\\$ )?")


def _in(path: Path, text: str, indent: str) -> Iterator[tuple[str, list[str]]]:
    starts = rf"^{indent}((?:[A-Z]+=\S+ )*(?:sbatch|srun|docker run|moe-train) .*)$"
    for line in re.findall(starts, text.replace("\\\n", " "), re.MULTILINE):
        words = shlex.split(line, comments=True)
        if "sbatch" in words or "train" in words:
            yield path.name, words


def option(words: list[str], name: str, otherwise: str | None = None) -> int:
    """``--name=N``, else what stands in a script's head."""
    found = [word.split("=", 1)[1] for word in words if word.startswith(f"--{name}=")]
    if not found and otherwise is not None:
        found = re.findall(rf"^#SBATCH --{name}=(\d+)$", otherwise, re.MULTILINE)
    return int(found[0])


def training(words: list[str]) -> tuple[list[str], int]:
    """Arguments of ``moe-train train``, and the number of processes."""
    if "sbatch" in words:
        at = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        head = (ROOT / words[at]).read_text()
        workers = "ntasks-per-node" if words[at].endswith("srun.sbatch") else "gpus-per-node"
        return words[at + 1 :], option(words[:at], "nodes", head) * option(words[:at], workers, head)
    arguments = words[words.index("train") + 1 :]
    parsed = parse("train", arguments)
    nodes = 2 if parsed.hostfile or parsed.launcher == "srun" else parsed.num_nodes or 1
    return arguments, nodes * (parsed.processes or SLOTS)


FOUND = list(commands())


def test_all_are_found() -> None:
    assert {name for name, _ in FOUND} == {path.name for path in [*SLURM.glob("*.sbatch"), *PAGES]}
    assert sum(name == "cluster.md" for name, _ in FOUND) == 6 and sum(name == "docker.md" for name, _ in FOUND) == 2
    assert {training(words)[1] for _, words in FOUND} == {8, 16}


@pytest.mark.parametrize(("name", "words"), FOUND, ids=[f"{name} {i}" for i, (name, _) in enumerate(FOUND)])
def test_it_is_taken_as_it_is_written(name: str, words: list[str]) -> None:
    arguments, processes = training(words)
    parsed = parse("train", arguments)
    check(load_run_config(parsed.config, parsed.overrides), processes)
