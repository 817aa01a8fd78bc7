"""The job script that starts the image under Slurm, run with programs that write down how they were called."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from moe_train.launch.supervise import Limits
from tests.reference.command_line import parse

ROOT = Path(__file__).resolve().parents[3]
SBATCH = ROOT / "launcher" / "slurm" / "container.sbatch"


def test_sbatch_options() -> None:
    lines = SBATCH.read_text().splitlines()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", "\n".join(lines), re.MULTILINE))
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "Slurm reads none after the first command"
    assert options["ntasks-per-node"] == "1" and "requeue" in options
    signal = re.fullmatch(r"B:USR1@(\d+)", options["signal"])
    assert signal is not None and int(signal[1]) >= Limits().stop


FAKES = {
    # Two tasks in a container whose entry point is ours; a signal ends them as it ends a training.
    "srun": """
        echo "srun $*" >> "$CALLS"
        while [ "${1#-}" != "$1" ]; do shift; done
        shift
        trap 'echo USR1 >> "$CALLS"; exit 138' USR1
        SLURM_NODEID=1 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=2 sh "$ENTRY" "$@"
        if [ "$FAKE_CODE" = wait ]; then
            kill -USR1 "$PPID"
            i=0; while [ $i -lt 200 ]; do sleep 0.05; i=$((i + 1)); done
            exit 99
        fi
        exit "$FAKE_CODE"
    """,
    "scontrol": """
        echo "scontrol $*" >> "$CALLS"
        if [ "$1" = show ]; then printf 'node-a\\nnode-b\\n'; fi
    """,
    "moe-train": """
        echo "moe-train $*" >> "$CALLS"
    """,
}


@pytest.mark.parametrize(
    ("code", "requeued"), [("0", False), ("1", False), ("2", False), ("131", True), ("143", True), ("wait", True)]
)
def test_sbatch_script(tmp_path: Path, code: str, requeued: bool) -> None:
    for name, script in FAKES.items():
        (tmp_path / name).write_text("#!/bin/sh\n" + script)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(calls), "ENTRY": str(ROOT / "docker" / "entrypoint.sh"),
        "FAKE_CODE": code, "IMAGE": "/shared/image.sqsh", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "1234577",
        "SLURM_CPUS_PER_TASK": "64",
    }  # fmt: skip
    result = subprocess.run(
        ["bash", str(SBATCH), "demo", "name=a b"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == (138 if code == "wait" else int(code)), result.stderr
    lines = calls.read_text().splitlines()
    assert ("scontrol requeue 1234577" in lines) is (code in ("131", "143", "wait"))
    assert ("USR1" in lines) is (code == "wait"), "the signal goes on to the step"
    assert (
        "--container-image=/shared/image.sqsh" in lines[1] and f"--container-mounts={tmp_path}:/workspace" in lines[1]
    )
    assert "--cpus-per-task=64" in lines[1], "srun does not take it over from sbatch since Slurm 22.05"
    train = next(line for line in lines if line.startswith("moe-train train"))
    assert train == (
        "moe-train train demo name=a b --resume auto --max-restarts 10 --launcher torchrun --no-ssh "
        "--num-nodes 2 --node-rank 1 --master-addr node-a --master-port 24577"
    )
    assert parse("train", ["demo", "name=ab", *train.split()[5:]]).resume == "auto"
