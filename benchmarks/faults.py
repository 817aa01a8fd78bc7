"""Kills random ranks of runs at random moments, and looks whether anything is lost.

One run is left alone. Others, of the same configuration, save every few steps in the background; again and again
SIGKILL hits one of their ranks, mostly while they train (that is, mostly while a checkpoint is being written),
sometimes while they start, and `--max-restarts` starts them again. Every run must finish with the same bits as the one
that was left alone: parameters, moments and generators of the last checkpoint. Whatever `latest` names at any moment
must verify.

    python benchmarks/faults.py --kills 100 --output faults.json
    python benchmarks/faults.py --kills 5 --kills-per-run 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_train.checkpoint import store  # noqa: E402
from moe_train.checkpoint.reading import StoredTensors  # noqa: E402
from moe_train.checkpoint.verify import damages  # noqa: E402
from moe_train.data.indexed import IndexedWriter  # noqa: E402
from moe_train.training.worker_status import files_of  # noqa: E402

VOCAB = 256
STARTING = 0.15
"""Share of kills that hit a run before it trains."""


@dataclass
class Watch:
    """Verifies every checkpoint that `latest` names, as soon as it does."""

    root: Path
    named: set[str] = field(default_factory=set)
    verified: int = 0
    damaged: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self._stop.wait(0.02):
            self.look()

    def look(self) -> None:
        with suppress(OSError):
            name = (self.root / store.LATEST).read_text().strip()
            stamp = f"{name} {os.stat(self.root / name).st_ino}"
            if stamp in self.named:
                return
            self.named.add(stamp)
            found = list(damages(self.root / name))
            # One that was removed by rule meanwhile, as newer ones took its place, says nothing and does not count.
            if not found or f"{name} {os.stat(self.root / name).st_ino}" == stamp:
                self.verified += 1
                self.damaged += [f"{name}: {line}" for line in found]

    def close(self) -> None:
        self._stop.set()


@dataclass
class Kill:
    run: int
    rank: int
    phase: str
    step: int
    """Steps that the rank had taken."""
    resumed: int | None = None
    """Step that the next start went on from; -1 the beginning."""
    seconds: float | None = None
    """From the kill until the run trained again."""


def write_data(folder: Path) -> None:
    rng = np.random.default_rng(1)
    for name, count in (("train", 60_000), ("validation", 2_000)):
        with IndexedWriter(folder / name, VOCAB) as writer:
            while writer.token_count < count:
                length = int(rng.integers(20, 200))
                writer.add((np.arange(length) * int(rng.integers(1, 5)) + rng.integers(0, VOCAB)) % VOCAB)


def command(options: argparse.Namespace, data: Path, run: Path, restarts: int) -> list[str]:
    settings = [
        *(f"data.train={data / 'train'}", f"data.validation={data / 'validation'}", "data.sequence_length=32"),
        *(f"model.vocab_size={VOCAB}", f"train.steps={options.steps}", "train.global_batch_size=4"),
        *("train.micro_batch_size=1", f"parallel.expert={options.processes}", "eval.every=0"),
        *("router.balancing.bias.rate=0.01", f"train.zero_stage={options.zero_stage}"),
        *(f"checkpoint.every_steps={options.every}", "checkpoint.keep=2"),
    ]
    launch = ["--processes", str(options.processes), "--launcher", options.launcher, "--run-dir", str(run)]
    return [
        *(sys.executable, "-m", "moe_train", "train", "tiny", *settings, *launch),
        *("--max-restarts", str(restarts), "--hang-timeout", "120"),
    ]


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def beats(run: Path, seen: set[int]) -> list[dict[str, Any]]:
    """Of processes that live, without those that were ``seen`` at an earlier kill."""
    found = [read_json(path) for path in files_of(run, "*.beat")]
    live = [beat for beat in found if beat is not None and psutil.pid_exists(beat["pid"])]
    return [beat for beat in live if beat["pid"] not in seen]


def latest_step(run: Path) -> int:
    """Of the newest checkpoint; -1 without one."""
    with suppress(OSError, ValueError):
        return int((run / "checkpoints" / store.LATEST).read_text().removeprefix(store.STEP))
    return -1


def wait_until(condition: Any, process: subprocess.Popen[str], seconds: float = 300.0) -> bool:
    """Whether it came true before the process ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError("the run does not go on")
        time.sleep(0.01)
    return True


def disturbed_run(options: argparse.Namespace, data: Path, run: Path, number: int, kills: int) -> dict[str, Any]:
    """One run, killed so often; what came of it."""
    chance = random.Random(f"{options.seed} {number}")
    watch = Watch(run / "checkpoints")
    threading.Thread(target=watch.run, daemon=True).start()
    log = (run.parent / f"{run.name}.log").open("w+")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    line = command(options, data, run, restarts=10 * kills)
    process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment)
    done: list[Kill] = []
    seen: set[int] = set()
    killed_at = 0.0
    saved: list[int] = []
    for _ in range(kills):
        early = chance.random() < STARTING and not (done and done[-1].phase in ("start", "load"))
        # A run is given up where several starts in a row save nothing, which a slow machine would make of many kills.
        least = saved[-1] + 1 if len(saved) > 1 and saved[-1] == saved[-2] else -1

        def ready(early: bool = early, least: int = least) -> bool:
            new = beats(run, seen)
            if len(new) < options.processes or latest_step(run) < least:
                return False
            return early or all(beat["phase"] in ("train", "save") for beat in new)

        if not wait_until(ready, process):
            break
        if done and done[-1].seconds is None and not early:
            done[-1].seconds = time.monotonic() - killed_at
        time.sleep(chance.random() * options.longest)
        alive = beats(run, seen)
        if not alive:
            break
        victim = chance.choice(sorted(alive, key=lambda beat: beat["rank"]))
        seen.update(beat["pid"] for beat in alive)
        saved.append(latest_step(run))
        done.append(Kill(number, victim["rank"], victim["phase"], victim["step"]))
        killed_at = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(victim["pid"], signal.SIGKILL)
        # Whoever launches: new processes go on from the newest checkpoint, and save none themselves so early.
        if not wait_until(lambda: bool(beats(run, seen)), process):
            break
        done[-1].resumed = latest_step(run)
    code = process.wait(timeout=1800)
    watch.look()
    watch.close()
    log.seek(0)
    text = log.read()
    return {
        "code": code,
        "kills": [vars(kill) for kill in done],
        "restarts": sum(kill.resumed is not None for kill in done),
        "verified": watch.verified,
        "damaged": watch.damaged,
        "end": text[-2000:] if code else "",
    }


def contents(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint."""
    directory = store.latest(run / "checkpoints")
    assert directory is not None
    found = {}
    with StoredTensors(directory) as stored:
        for key, shape in stored.shapes.items():
            found[key] = torch.empty(shape, dtype=stored.dtypes[key])
            stored.read(key, (0,) * len(shape), found[key])
    return found


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    if one.keys() != other.keys():
        return sorted(one.keys() ^ other.keys())
    return [key for key in one if not torch.equal(one[key], other[key])]


def repeated_steps(run: Path) -> bool:
    """Whether metrics.jsonl does not have each step exactly once."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["kind"] == "train"]
    return steps != list(range(1, steps[-1] + 1))


def campaign(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    data = folder / "data"
    data.mkdir()
    write_data(data)
    alone = folder / "alone"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run(command(options, data, alone, 0), check=True, env=environment, stdout=subprocess.DEVNULL)
    wanted = contents(alone)
    runs: list[dict[str, Any]] = []
    left = options.kills
    while left > 0:
        run = folder / f"run_{len(runs)}"
        result = disturbed_run(options, data, run, len(runs), min(left, options.kills_per_run))
        result["differing"] = differing(contents(run), wanted) if result["code"] == 0 else None
        result["repeated_steps"] = repeated_steps(run) if result["code"] == 0 else None
        runs.append(result)
        left -= len(result["kills"])
        print(f"run {len(runs)}: code {result['code']}, {len(result['kills'])} kills, {left} left", flush=True)
        if not result["kills"]:
            break
    return summary(runs) | {"options": {k: str(v) for k, v in vars(options).items()}, "runs": runs}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    kills = [kill for run in runs for kill in run["kills"]]
    lost = [max(0, kill["step"] - max(0, kill["resumed"])) for kill in kills if kill["resumed"] is not None]
    seconds = [kill["seconds"] for kill in kills if kill["seconds"] is not None]
    return {
        "kills": len(kills),
        "by_phase": {phase: sum(k["phase"] == phase for k in kills) for phase in sorted({k["phase"] for k in kills})},
        "runs_finished": sum(run["code"] == 0 for run in runs),
        "runs_total": len(runs),
        "runs_bit_equal": sum(run["differing"] == [] for run in runs),
        "runs_with_repeated_steps": sum(run["repeated_steps"] is True for run in runs),
        "checkpoints_verified": sum(run["verified"] for run in runs),
        "checkpoints_damaged": sum(len(run["damaged"]) for run in runs),
        "steps_lost_mean": statistics.fmean(lost) if lost else None,
        "steps_lost_max": max(lost, default=None),
        "seconds_to_train_again_median": statistics.median(seconds) if seconds else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills-per-run", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400, help="of each run")
    parser.add_argument("--every", type=int, default=3, help="steps between two checkpoints")
    parser.add_argument(
        "--longest", type=float, default=4.0, help="seconds that a start may train before the next kill"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--launcher", choices=("deepspeed", "torchrun"), default="deepspeed")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of ranks and moments")
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--output", type=Path, help="all figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = campaign(options, folder)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("runs", "options")}, indent=1))
    for run in result["runs"]:
        print(run["end"], end="")
    good = result["runs_bit_equal"] == result["runs_total"] and not result["checkpoints_damaged"]
    return 0 if good and result["kills"] >= options.kills and not result["runs_with_repeated_steps"] else 1


if __name__ == "__main__":
    sys.exit(main())
