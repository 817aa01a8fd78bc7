"""Seconds and memory of convert import and export against transformers' from_pretrained and save_pretrained.

The model is a random qwen3_moe in bfloat16. Each step runs in a process of its own, which has done the same with a tiny
model before, so that no import is measured; memory is the peak of resident memory above what the process had then. The
four steps take turns for several rounds. import reads the files and writes a checkpoint, and export reads one and
writes the files, both until they are on the disk; from_pretrained reads files into memory, and save_pretrained writes
files from memory without waiting for the disk.

    python benchmarks/interop.py
    python benchmarks/interop.py --experts 128 --layers 12 --rounds 5 --json result.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = {"import": "from_pretrained", "export": "save_pretrained"}
"""Ours -> theirs."""
LIMIT = 1.2
TINY = {"layers": 2, "hidden": 64, "width": 32, "experts": 4}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 8), ("hidden", 1024), ("width", 384), ("experts", 64), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"(default {value})")
    parser.add_argument("--shard-size", default="500MB", metavar="SIZE", help="largest file (default 500MB)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    parser.add_argument("--step", choices=["make", *STEPS, *STEPS.values()], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def make(folder: Path, sizes: dict[str, int], shard_size: str) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=32000 if sizes["hidden"] > 64 else 128,
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["hidden"] // 64,
        num_key_value_heads=max(1, sizes["hidden"] // 256),
        head_dim=64,
        moe_intermediate_size=sizes["width"],
        num_experts=sizes["experts"],
        num_experts_per_tok=4,
        norm_topk_prob=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen3MoeForCausalLM(config).save_pretrained(folder, max_shard_size=shard_size)


def step(name: str, folder: Path, shard_size: str) -> dict[str, float]:
    """Does one step with the tiny model, then measures it with the large one."""
    from moe_train.commands.convert import size

    if name in STEPS:
        from moe_train.training.convert import export_model, import_model

        actions: dict[str, Callable[[Path], Any]] = {
            "import": lambda at: import_model(at / "hub", at / "ours"),
            "export": lambda at: export_model(at / "ours", at / "export", shard_bytes=size(shard_size)),
        }
        action = actions[name]
        action(folder / "tiny")
        return measured(lambda: action(folder / "large"))
    import torch
    from transformers import Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    def load(at: Path) -> Any:
        return Qwen3MoeForCausalLM.from_pretrained(at / "hub", dtype=torch.bfloat16)

    load(folder / "tiny").save_pretrained(folder / "tiny" / "saved")
    if name == "from_pretrained":
        return measured(lambda: load(folder / "large"))
    model = load(folder / "large")
    for parameter in model.parameters():  # now in memory of the process, as after training, and not mapped from files
        parameter.data = parameter.data.clone()
    return measured(lambda: model.save_pretrained(folder / "large" / "saved", max_shard_size=shard_size))


def measured(action: Callable[[], Any]) -> dict[str, float]:
    """Wall seconds, processor seconds, and bytes of the peak of resident memory above that at the start."""
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    before, begin, processor = memory("VmRSS"), time.perf_counter(), time.process_time()
    action()
    return {
        "seconds": time.perf_counter() - begin,
        "processor": time.process_time() - processor,
        "bytes": memory("VmHWM") - before,
    }


def memory(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def in_process(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    for part in ("tiny", "large"):
        for made in {"import": ["ours"], "export": ["export"]}.get(name, ["saved"]):
            shutil.rmtree(folder / part / made, ignore_errors=True)
    os.sync()  # so that no step waits for what another one wrote
    sizes = [f"--{key}={getattr(arguments, key)}" for key in TINY]
    command = [sys.executable, __file__, "--step", name, "--folder", str(folder), "--shard-size", arguments.shard_size]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *sizes], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1])) if name != "make" else {}


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.step == "make":
        for part, sizes in (("tiny", TINY), ("large", {key: getattr(arguments, key) for key in TINY})):
            make(arguments.folder / part / "hub", sizes, arguments.shard_size)
        return 0
    if arguments.step:
        print(json.dumps(step(arguments.step, arguments.folder, arguments.shard_size)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        in_process("make", folder, arguments)
        total = sum(path.stat().st_size for path in (folder / "large" / "hub").glob("*.safetensors"))
        print(f"{total / 1e9:.2f} GB, {arguments.rounds} rounds; medians")
        order = [step for pair in STEPS.items() for step in pair]
        found: dict[str, list[dict[str, float]]] = {step: [] for step in order}
        for turn in range(arguments.rounds):
            for each in order if turn % 2 == 0 else [order[1], order[0], order[3], order[2]]:
                found[each].append(in_process(each, folder, arguments))
    medians = {s: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]} for s, rounds in found.items()}
    for each, m in medians.items():
        every = " ".join(f"{r['seconds']:.2f}" for r in found[each])
        print(
            f"{each:16} {m['seconds']:6.2f} s ({every}), processor {m['processor']:5.2f} s, {m['bytes'] / 1e6:7.0f} MB"
        )
    good = True
    for ours, theirs in STEPS.items():
        ratio = medians[ours]["seconds"] / medians[theirs]["seconds"]
        less = medians[ours]["bytes"] < medians[theirs]["bytes"]
        good &= ratio <= LIMIT and less
        print(f"{ours} / {theirs}: {ratio:.2f} times the seconds (goal {LIMIT}), {'less' if less else 'MORE'} memory")
    if arguments.json:
        arguments.json.write_text(json.dumps({"bytes": total, "rounds": found, "medians": medians}, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
