"""Inference of a model with experts against dense models of equal active and of equal total size.

    python benchmarks/inference.py                          # CPU float32 or CUDA bfloat16, geometry "small"
    python benchmarks/inference.py --preset 0.6b --batches 1 8 32
    python benchmarks/inference.py --router lpr

Arms: `experts`; `active`, a dense model whose feed-forward layers are as wide as the experts that one token passes;
`total`, as wide as all experts together. Weights are random (speed does not depend on them, but the choice of experts
does: they are spread evenly by chance). For each number of sequences: prefill of the prompt, then one token at a time
with the key-value cache. Arms take turns within a round and ratios are taken within a round, so that a busy machine
disturbs all alike. FLOPs are counted by torch's FlopCounterMode on a forward pass with plain attention (the whole
square of the scores), not computed from a formula; the prefill computes the head for the last token only. Peak memory
is that of a process of its own. Needs: pip install 'moe-train[benchmark]'.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from geometry import PRESETS, Geometry
from measure import memory_now, memory_peak, spread
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_train.model.cache import KeyValueCache
from moe_train.model.language_model import LanguageModel, build_language_model
from moe_train.model.micro_batch import MicroBatch, use
from moe_train.model.options import ModelOptions, MoEOptions
from moe_train.parallel.groups import initialize
from moe_train.parallel.options import ParallelOptions
from moe_train.routing import TokenBatch, gate_options
from moe_train.routing.options import RouterOptions

ARMS = ("experts", "active", "total")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="geometry (default small)")
    parser.add_argument("--router", default="softmax_topk", help="gate of the arm with experts")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="sequences at a time (default 1 8)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt (default 256)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens generated per round (default 16)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds behind one that is not (default 7)")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--output", type=Path, help="write everything as JSON into this file")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = initialize(ParallelOptions()).device
    geometry = PRESETS[options.preset]
    if options.memory_of:
        print(json.dumps(_memory(options, geometry, device)))
        return 0
    models = {arm: _build(arm, geometry, options.router, device) for arm in ARMS}
    results: dict[str, Any] = {"setting": _setting(options, geometry, device), "models": {}, "batches": {}}
    for arm, model in models.items():
        results["models"][arm] = _sizes(arm, geometry, options, model, device)
    for count in options.batches:
        results["batches"][count] = _compare(models, count, options, geometry, device)
    _report(results)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def _build(arm: str, g: Geometry, gate: str, device: torch.device, counted: bool = False) -> LanguageModel:
    """``counted``: experts as a loop, whose multiplications torch counts; the grouped kernel's it does not know."""
    moe = MoEOptions(g.experts, g.expert_ffn, experts="reference" if counted else "grouped")
    options = ModelOptions(
        family="qwen3_moe",
        num_layers=g.layers,
        hidden_size=g.hidden,
        num_attention_heads=g.heads,
        num_key_value_heads=g.kv_heads,
        head_dim=g.head_dim,
        vocab_size=g.vocab,
        moe=moe,
    )
    if arm != "experts":
        width = g.expert_ffn * (g.top_k if arm == "active" else g.experts)
        options = dataclasses.replace(options, family="qwen3", ffn_hidden_size=width)
    known = {field.name for field in dataclasses.fields(gate_options(gate))}
    router = RouterOptions(gate, {name: g.top_k for name in ("top_k", "max_k") if name in known})
    model = build_language_model(options, router, sequence_length=g.sequence, seed=0)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


class _Run:
    """One prompt and what follows it, for a number of sequences."""

    def __init__(self, model: LanguageModel, ids_BS: torch.Tensor, tokens: int) -> None:
        self.model, self.ids_BS = model, ids_BS
        self.cache = KeyValueCache(len(ids_BS), ids_BS.shape[1] + tokens, ids_BS.device)

    def read(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Reads tokens; the most likely next ones [B, 1]."""
        batch, count = ids_BS.shape
        sample_T = torch.arange(batch, device=ids_BS.device).expand(count, batch).flatten()
        position_T = self.cache.positions(count).flatten()
        padding_T = torch.zeros_like(sample_T, dtype=torch.bool)
        tokens = TokenBatch(ids_BS.t().flatten(), sample_T, position_T, padding_T, count, batch)
        last_B = torch.full((batch,), count - 1, device=ids_BS.device)
        with torch.no_grad(), use(MicroBatch(tokens, cache=self.cache, predict_B=last_B)):
            logits_B1V = self.model(ids_BS)
        self.cache.advance(torch.full_like(last_B, count))
        return logits_B1V.argmax(-1)


def _compare(models: dict[str, Any], count: int, options: Any, g: Geometry, device: torch.device) -> dict[str, Any]:
    prefill: dict[str, list[float]] = {arm: [] for arm in models}
    token: dict[str, list[float]] = {arm: [] for arm in models}
    for number in range(options.rounds + 1):
        ids_BS = torch.randint(g.vocab, (count, options.prompt), generator=torch.Generator().manual_seed(number))
        turn = number % len(models)
        for arm in [*models][turn:] + [*models][:turn]:
            run = _Run(models[arm], ids_BS.to(device), options.tokens)
            seconds, next_B1 = _timed(lambda run=run: run.read(run.ids_BS), device)
            steps = []
            for _ in range(options.tokens):
                step, next_B1 = _timed(lambda run=run, ids=next_B1: run.read(ids), device)
                steps.append(step)
            if number:
                prefill[arm].append(seconds)
                token[arm].append(median(steps))
    return {
        arm: {
            name: spread(values[arm]) | {"against_experts": _ratio(values[arm], values["experts"])}
            for name, values in (("prefill", prefill), ("token", token))
        }
        for arm in models
    }


def _timed(work: Any, device: torch.device) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def _ratio(values: list[float], experts: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(values, experts, strict=True)])


def _sizes(arm: str, g: Geometry, options: Any, model: LanguageModel, device: torch.device) -> dict[str, Any]:
    counted = _build(arm, g, options.router, device, counted=True)
    ids_BS = torch.randint(g.vocab, (1, options.prompt), device=device)
    run = _Run(counted, ids_BS, 1)
    # The counter knows attention as plain multiplications only: it sees the whole square of the scores.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as prefill:
        next_B1 = run.read(ids_BS)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as token:
        run.read(next_B1)
    kept = sum(t.numel() * t.element_size() for layer in run.cache._kept.values() for t in layer)
    memory = subprocess.run(_memory_command(arm, options), capture_output=True, text=True, check=True)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "prefill_flops_per_token": prefill.get_total_flops() / options.prompt,
        "token_flops": token.get_total_flops(),
        "cache_bytes_per_token": kept / run.cache.capacity,
        "memory": json.loads(memory.stdout),
    }


def _memory_command(arm: str, options: Any) -> list[str]:
    own = ["--preset", options.preset, "--router", options.router, "--prompt", options.prompt]
    threads = ["--threads", options.threads] if options.threads else []
    batches = ["--batches", max(options.batches), "--memory-of", arm]
    return [str(part) for part in (sys.executable, __file__, *own, *threads, *batches)]


def _memory(options: Any, g: Geometry, device: torch.device) -> dict[str, int]:
    """Of the largest batch: prompt and one token."""
    before = memory_now(device)
    model = _build(options.memory_of, g, options.router, device)
    loaded = memory_now(device)
    ids_BS = torch.randint(g.vocab, (options.batches[0], options.prompt), device=device)
    run = _Run(model, ids_BS, 1)
    run.read(run.read(ids_BS))
    return {"weights": loaded - before, "peak": memory_peak(device) - before}


def _setting(options: Any, g: Geometry, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    own = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "router": options.router}
    return own | {"prompt": options.prompt} | dataclasses.asdict(g)


def _report(results: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 130)
    table = Table(title="sizes")
    for heading in ("arm", "parameters", "MFLOP/token, prefill", "MFLOP/token, one by one", "cache B/token", "peak MB"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm, row in results["models"].items():
        flops = (row["prefill_flops_per_token"] / 1e6, row["token_flops"] / 1e6)
        peak = row["memory"]["peak"] / 2**20
        table.add_row(
            arm,
            f"{row['parameters'] / 1e6:.1f}M",
            *(f"{value:.1f}" for value in flops),
            f"{row['cache_bytes_per_token']:.0f}",
            f"{peak:.0f}",
        )
    console.print(table)
    for count, arms in results["batches"].items():
        table = Table(title=f"{count} sequence{'s' if count > 1 else ''} at a time")
        for heading in ("arm", "prefill ms", "time / experts", "ms per token", "time / experts"):
            table.add_column(heading, justify="left" if heading == "arm" else "right")
        for arm, row in arms.items():
            cells = []
            for name in ("prefill", "token"):
                ratio = row[name]["against_experts"]
                text = f"{ratio['median']:.2f} ({ratio['quartile_1']:.2f}-{ratio['quartile_3']:.2f})"
                cells += [f"{1e3 * row[name]['median']:.2f}", text]
            table.add_row(arm, *cells)
        console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
