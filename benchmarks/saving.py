"""What a checkpoint costs the training: saved at once, saved in the background, not saved, in turn in one process.

    python benchmarks/saving.py --output saving.json
    torchrun --nproc-per-node 2 benchmarks/saving.py --folder /disk/to/measure

A round of an arm is one save and as many training steps as --steps; what is still being written then is waited for. The
stall is what training waits before its next step; the cost is how much longer the round takes than one without a save,
so it holds also what the writing thread takes from the steps. Memory is the copy that a save in the background keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ARMS = {"none": None, "at once": False, "in the background": True}
"""Whether CheckpointOptions.asynchronous; None: no save."""


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    import torch.distributed as dist
    from arms import EngineArm, Setting, build_ours
    from geometry import PRESETS

    from moe_train.parallel.groups import initialize
    from moe_train.parallel.options import ParallelOptions
    from moe_train.training.checkpoints import Checkpoints
    from moe_train.training.options import CheckpointOptions

    groups = initialize(ParallelOptions())
    precision = "bfloat16" if groups.device.type == "cuda" else "float32"
    setting = Setting(PRESETS[options.preset], True, groups.device, precision)
    arm = EngineArm(build_ours(setting), setting, groups)
    with tempfile.TemporaryDirectory() as temporary:
        root = [str(options.folder or temporary)]
        dist.broadcast_object_list(root)
        savers = {
            name: Checkpoints(CheckpointOptions(keep=1, asynchronous=background), Path(root[0]) / name, arm.engine)
            for name, background in ARMS.items()
            if background is not None
        }
        rounds = measure(arm, savers, _batches(setting, groups.rank), options)
        size = _bytes(Path(root[0]) / "at once")
        dist.barrier()
    if groups.rank == 0:
        found = {"world_size": groups.world_size, "checkpoint_bytes": size, **summary(rounds)}
        print(table(found))
        if options.output:
            options.output.write_text(json.dumps(found | {"rounds": rounds}, indent=1) + "\n")
    arm.close()
    return 0


def measure(arm: Any, savers: dict[str, Any], batches: list[Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of each round: {arm: {"round", "stall", "in_place"}}."""
    rounds = []
    number = 0
    for index in range(options.warmup + options.rounds):
        names = list(ARMS)
        turn = index % len(names)
        found = {}
        for name in names[turn:] + names[:turn]:
            number += 1
            found[name] = _round(arm, savers.get(name), number, batches, options.steps)
        if index >= options.warmup:
            rounds.append(found)
    return rounds


def _round(arm: Any, saver: Any, number: int, batches: list[Any], steps: int) -> dict[str, float]:
    _synchronize()
    start = time.perf_counter()
    records = []
    if saver is not None:
        state = {"consumed": number, "tokens": number, "samples": {}, "config": {}}
        records += saver.save(number, state)
    for index in range(steps):
        arm.step(batches[index % len(batches)])
        if saver is not None:
            records += saver.poll()
    if saver is not None:
        records += saver.finish()
    _synchronize()
    found = {"round": time.perf_counter() - start}
    if saver is not None:
        (record,) = records
        found |= {"stall": record["stall_seconds"], "in_place": record["seconds"]}
    return found


def _synchronize() -> None:
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def _batches(setting: Any, rank: int) -> list[Any]:
    from batches import random_batch

    return [random_batch(setting.geometry, seed=1000 * rank + i) for i in range(4)]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.distcp"))


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds; the ratios are taken round by round."""
    found: dict[str, Any] = {"rounds_measured": len(rounds), "training": _median(r["none"]["round"] for r in rounds)}
    for name in ("at once", "in the background"):
        found[name] = {
            "stall": _median(r[name]["stall"] for r in rounds),
            "in_place": _median(r[name]["in_place"] for r in rounds),
            "cost": _median(r[name]["round"] - r["none"]["round"] for r in rounds),
        }
    found["stall_ratio"] = _median(r["at once"]["stall"] / r["in the background"]["stall"] for r in rounds)
    return found


def _median(values: Any) -> float:
    return statistics.median(list(values))


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['world_size']} processes, {found['checkpoint_bytes'] / 2**20:,.0f} MiB per checkpoint, "
        f"{found['rounds_measured']} rounds; a round without a save: {found['training']:.2f} s",
        "",
        "| saved | stall, s | in place after, s | round longer by, s |",
        "|---|---:|---:|---:|",
    ]
    for name in ("at once", "in the background"):
        row = found[name]
        lines.append(f"| {name} | {row['stall']:.3f} | {row['in_place']:.3f} | {row['cost']:.3f} |")
    return "\n".join([*lines, "", f"stall at once / in the background: {found['stall_ratio']:.1f}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before")
    parser.add_argument("--steps", type=int, default=6, help="training steps after each save")
    parser.add_argument("--preset", choices=("small", "0.6b", "test"), default="small", help="geometry")
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="all figures as JSON")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
