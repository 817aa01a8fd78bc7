"""Training step of moe_train against transformers' Qwen3MoeForCausalLM: the same weights, the same batches, in turn.

    python benchmarks/train_step.py                               # CPU float32 or CUDA bfloat16, geometry "small"
    python benchmarks/train_step.py --preset 0.6b --batch 32      # on a GPU
    python benchmarks/train_step.py --breakdown --arms engine     # where the time goes

Each step is forward, backward, clipping and AdamW, without auxiliary losses, on random tokens unless --data names a
prepared data set. All arms must give the same loss (1e-5, float32) before anything is timed. Ratios are taken within a
round, so that a busy machine disturbs both sides. Needs: pip install 'moe-train[benchmark]'.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    from arms import Setting

    from moe_train.parallel.groups import initialize
    from moe_train.parallel.options import ParallelOptions

    groups = initialize(ParallelOptions())
    precision = options.precision or ("bfloat16" if groups.device.type == "cuda" else "float32")
    setting = Setting(_geometry(options), options.balance == "forced", groups.device, precision)
    if options.memory_of:
        print(json.dumps(_peak_memory(options.memory_of, setting, groups, options)))
        return 0
    results = {}
    for balance in ("learned", "forced") if options.balance == "both" else (options.balance,):
        setting = dataclasses.replace(setting, forced_balance=balance == "forced")
        results[balance] = _compare(setting, groups, options, balance)
    document = {"setting": _description(setting, options), "results": results}
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        print(f"written: {options.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    from arms import ARMS
    from geometry import PRESETS, Geometry

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=list(ARMS),
        default=list(ARMS),
        help="which to run, default all: " + "; ".join(f"{name} = {text}" for name, text in ARMS.items()),
    )
    parser.add_argument("--steps", type=int, default=20, help="timed rounds (default 20)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before (default 3)")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], help="default: float32 on CPU, bfloat16 on CUDA"
    )
    parser.add_argument(
        "--balance",
        choices=["learned", "forced", "both"],
        default="both",
        help="experts chosen by the gate, or round-robin (default both)",
    )
    parser.add_argument("--breakdown", action="store_true", help="also time the parts of our step")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (a process of its own per arm)")
    parser.add_argument("--data", help="prefix of a prepared data set; default: random tokens")
    parser.add_argument("--output", type=Path, help="write everything as JSON into this file")
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="geometry (default small)")
    for field in dataclasses.fields(Geometry):
        name = field.name.replace("_", "-")
        parser.add_argument(f"--{name}", type=int, help=f"overrides the preset (small: {field.default})")
    parser.add_argument("--memory-of", choices=list(ARMS), help=argparse.SUPPRESS)
    return parser


def _geometry(options: argparse.Namespace) -> Any:
    from geometry import PRESETS, Geometry

    own = {f.name: getattr(options, f.name) for f in dataclasses.fields(Geometry)}
    return dataclasses.replace(PRESETS[options.preset], **{k: v for k, v in own.items() if v is not None})


def _batches(count: int, setting: Any, options: argparse.Namespace) -> list[Any]:
    """Step i has samples i * batch and following, whatever the arm."""
    from batches import random_batch

    g = setting.geometry
    if options.data:
        from moe_train.data.options import DataOptions
        from moe_train.data.training_set import open_training_set

        data = DataOptions(train=options.data, sequence_length=g.sequence)
        samples = open_training_set(data, seed=0, batch_size=g.batch, cache=Path(), once=lambda work: work())
        batches = [samples.batch(i * g.batch, g.batch) for i in range(count)]
        if max(int(b.ids_BS.max()) for b in batches) >= g.vocab:
            raise SystemExit(f"{options.data} holds token ids of {g.vocab} and more: give --vocab")
        return batches
    return [random_batch(g, i) for i in range(count)]


def _compare(setting: Any, groups: Any, options: argparse.Namespace, balance: str) -> dict[str, Any]:
    from arms import BASELINE, build_arm, check_equal, reference_losses
    from measure import alternate, matmul_flops, speed_ratio, spread

    from moe_train.training.account import flops_per_token
    from moe_train.training.environment import device_facts
    from moe_train.training.peak import peak_flops

    batches = _batches(options.warmup + options.steps, setting, options)
    losses = reference_losses(options.arms, setting, batches[0])
    check_equal(losses)
    arms = {name: build_arm(name, setting, groups) for name in options.arms}
    ceiling = matmul_flops(setting.device, setting.dtype)
    timings = alternate(arms, batches, options.warmup, setting.device)
    ceiling = max(ceiling, matmul_flops(setting.device, setting.dtype))
    tokens = setting.geometry.tokens
    flops = flops_per_token(_run_config(setting)).total
    peak = peak_flops(device_facts()["device"])
    result: dict[str, Any] = {
        "loss_before": losses,
        "matmul_flops": ceiling,
        "flops_per_token": flops,
        "peak_flops": peak,
        "arms": {},
    }
    for name, timing in timings.items():
        seconds = spread(timing.wall)
        row = {
            "seconds": seconds,
            "cpu_seconds": spread(timing.cpu),
            "tokens_per_second": tokens / seconds["median"],
            "mfu": tokens * flops / seconds["median"] / peak if peak else None,
            "share_of_matmul": tokens * flops / seconds["median"] / ceiling,
            "last_loss": timing.losses[-1],
        }
        if BASELINE in timings:
            row[f"speed_against_{BASELINE}"] = speed_ratio(timing, timings[BASELINE])
        if not options.no_memory:
            row["memory"] = _memory_in_child(name, balance)
        result["arms"][name] = row
    from table import print_breakdown, print_comparison

    print_comparison(balance, result)
    if options.breakdown:
        result["breakdown"] = _breakdowns(arms, batches, setting)
        print_breakdown(balance, result["breakdown"])
    for arm in arms.values():
        arm.close()
    arms.clear()
    gc.collect()
    return result


def _breakdowns(arms: dict[str, Any], batches: list[Any], setting: Any) -> dict[str, Any]:
    from breakdown import breakdown

    return {name: breakdown(arms[name], batches, setting.device) for name in ("engine", "model") if name in arms}


def _run_config(setting: Any) -> Any:
    from geometry import run_config

    return run_config(setting.geometry, forced_balance=setting.forced_balance, precision=setting.precision)


def _memory_in_child(arm: str, balance: str) -> dict[str, int]:
    """Peak memory of one arm in a process of its own, where nothing else lives."""
    command = [sys.executable, *sys.argv, "--memory-of", arm, "--balance", balance]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _peak_memory(name: str, setting: Any, groups: Any, options: argparse.Namespace) -> dict[str, int]:
    from arms import build_arm
    from measure import memory_now, memory_peak

    batches = _batches(3, setting, options)
    arm = build_arm(name, setting, groups)
    gc.collect()
    before = memory_now(setting.device)
    for batch in batches:
        arm.step(batch)
    return {"before_first_step": before, "peak": memory_peak(setting.device)}


def _description(setting: Any, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from moe_train.training.environment import environment

    return {
        **environment(processes=1),
        "geometry": dataclasses.asdict(setting.geometry),
        "precision": setting.precision,
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "warmup": options.warmup,
        "data": options.data or "random tokens",
    }


if __name__ == "__main__":
    raise SystemExit(main())
