"""What ``moe-train plan`` prints: tables on a terminal, aligned text elsewhere, or JSON."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from typing import Any

from moe_train.launch.cost_model import Hardware
from moe_train.launch.layouts import Plan, Proposal, RuledOut
from moe_train.training.account import active_parameters, flops_per_token, parameters
from moe_train.training.memory import logits_bytes
from moe_train.training.run_config import RunConfig
from moe_train.training.traffic import Traffic, traffic

GIB = 2**30
Rows = list[list[str]]


def print_json(config: RunConfig, hardware: Hardware, proposal: Proposal, helpful: list[str]) -> None:
    """One object: all layouts, best first, and all that were ruled out. Bytes and seconds."""
    result = {
        "name": config.name,
        "global_batch_size": config.train.global_batch_size,
        "hardware": dataclasses.asdict(hardware),
        "layouts": [_described(plan, hardware) for plan in proposal.plans],
        "ruled_out": [dataclasses.asdict(item) for item in proposal.ruled_out],
        "would_help": helpful,
    }
    print(json.dumps(result, indent=1))


def _described(plan: Plan, hardware: Hardware) -> dict[str, Any]:
    return {
        "layout": dataclasses.asdict(plan.layout),
        "overrides": plan.layout.overrides(),
        "accumulation": plan.accumulation,
        "memory": {
            **dataclasses.asdict(plan.memory),
            "logits": logits_bytes(plan.config, "cuda"),
            **{f"buffer_{name}": size for name, size in dataclasses.asdict(plan.buffers).items()},
            "need": plan.need,
            "host": plan.host.total,
            **{f"host_{name}": size for name, size in dataclasses.asdict(plan.host).items()},
        },
        "sent": [{**dataclasses.asdict(item), "sent": item.sent} for item in traffic(plan.config, hardware.gpus)],
        "seconds": {**dataclasses.asdict(plan.times), "total": plan.times.total},
        "tokens_per_second": tokens_per_step(plan.config) / plan.times.total,
        "mfu": mfu(plan, hardware),
    }


def tokens_per_step(config: RunConfig) -> int:
    return config.train.global_batch_size * config.data.sequence_length


def mfu(plan: Plan, hardware: Hardware) -> float:
    """Model FLOPs of the step, recomputation not counted, against the peak of all GPUs."""
    flops = flops_per_token(plan.config).total * tokens_per_step(plan.config)
    return flops / (plan.times.total * hardware.gpus * hardware.peak * 1e12)


def print_text(
    config: RunConfig, hardware: Hardware, proposal: Proposal, helpful: list[str], command: list[str], show: int | None
) -> None:
    """``command``: what the best layout's keys are added to. ``show``: rows of layouts; None for all."""
    print(_heading(config, hardware))
    if proposal.plans:
        best = proposal.plans[0]
        shown = proposal.plans[:show]
        _table(
            f"{len(shown)} of {len(proposal.plans)} layouts that fit, shortest step first", layout_rows(shown, hardware)
        )
        _table("memory of one rank in the best one, GiB", memory_rows(best))
        sent = traffic(best.config, hardware.gpus)
        _table("what one rank sends in a step of it", sent_rows(sent) if sent else [["nothing: it works alone"]])
    ruled_out = proposal.ruled_out if show is None else shortened(proposal)
    if ruled_out:
        rows = [["layout", "why not"], *([item.layout, item.reason] for item in ruled_out)]
        _table("ruled out", rows, numbers=False)
    if proposal.plans:
        slots = hardware.ranks_per_node
        start = f"--processes {slots}" if hardware.gpus == slots else f"--hostfile HOSTS (each with slots={slots})"
        given = {key.split("=", 1)[0] for key in best.layout.overrides()}
        kept = [word for word in command if word.split("=", 1)[0] not in given]
        print(f"\nbest: {' '.join([*kept, *best.layout.overrides(), start])}")
        print("Times come from a cost model (docs/parallelism.md) and are no measurement.")
    else:
        print("\nNo layout fits. " + ("What would help:" if helpful else "Nothing that is known here would help."))
        for text in helpful:
            print(f"  {text}")


def _heading(config: RunConfig, hardware: Hardware) -> str:
    total, active = parameters(config).total, active_parameters(config)
    nodes = max(1, hardware.gpus // hardware.gpus_per_node)
    return (
        f"{config.name}: {total:,} parameters, {active:,} active, {config.train.precision}; "
        f"{config.train.global_batch_size:,} sequences of {config.data.sequence_length:,} tokens per step\n"
        f"{hardware.gpus} GPUs of {hardware.memory:g} GiB in {nodes} node{'s' if nodes > 1 else ''}, "
        f"{hardware.usable / GIB:,.1f} GiB of each to use; {hardware.peak:g} TFLOP/s x {hardware.efficiency:g}, "
        f"{hardware.node_bandwidth:g} GB/s in a node, {hardware.network_bandwidth:g} between nodes"
    )


def layout_rows(plans: list[Plan], hardware: Hardware) -> Rows:
    """Header and one row for each. micro: sequences x accumulation; GiB, worst (where all tokens choose the experts of
    one rank) and host: memory of one rank; sent: GB of one rank; sending: part of the step; ktok/s: of one GPU."""
    names = "TP EP DP ZeRO recompute offload micro GiB worst host sent s/step sending ktok/s MFU"
    rows = [names.split()]
    for plan in plans:
        layout, times = plan.layout, plan.times
        tokens = tokens_per_step(plan.config) / times.total / hardware.gpus
        sent = sum(item.sent for item in traffic(plan.config, hardware.gpus))
        numbers = [layout.tensor, layout.expert, layout.data, layout.zero]
        rows.append(
            [
                *map(str, numbers),
                "yes" if layout.recompute else "-",
                "cpu" if layout.offload == "cpu" else "-",
                f"{layout.micro_batch} x {plan.accumulation}",
                f"{plan.need / GIB:.1f}",
                f"{(plan.need + plan.memory.further_worst_case) / GIB:.1f}",
                f"{plan.host.total / GIB:.1f}",
                f"{sent / 1e9:.2f}",
                f"{times.total:.3g}",
                f"{(times.experts + times.zero + times.tensor) / times.total:.0%}",
                f"{tokens / 1e3:.1f}",
                f"{mfu(plan, hardware):.0%}",
            ]
        )
    return rows


def memory_rows(plan: Plan) -> Rows:
    """Header and one row for each kind."""
    memory, logits = plan.memory, logits_bytes(plan.config, "cuda")
    kinds = [
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations - logits),
        ("logits", logits),
        ("bucket of gradients", plan.buffers.bucket + plan.buffers.reduction),
        ("gathered parameters", plan.buffers.gathered),
        ("all together", plan.need),
        ("more, if all tokens choose the experts of one rank", memory.further_worst_case),
        ("host memory: offloaded optimizer", plan.host.optimizer),
        ("host memory: copy for background saves", plan.host.save_copy),
    ]
    return [["", "GiB"], *([name, f"{size / GIB:.2f}"] for name, size in kinds)]


def sent_rows(items: list[Traffic]) -> Rows:
    """Header and one row for each purpose."""
    rows = [["what", "collective", "ranks", "GB"]]
    return [*rows, *([i.name, i.operation, str(i.ranks), f"{i.sent / 1e9:.4g}"] for i in items)]


def shortened(proposal: Proposal) -> list[RuledOut]:
    """One line for all ways of a group and a ZeRO stage of which none fits, the one that needs least; and one for all
    groups with the same reason."""
    fit = {_stage(str(plan.layout)) for plan in proposal.plans}
    least: dict[str, RuledOut] = {}
    for item in proposal.ruled_out:
        stage = _stage(item.layout)
        known = least.get(stage)
        if stage not in fit and (known is None or (item.need or 0) < (known.need or 0)):
            least[stage] = item
    alike: dict[str, list[RuledOut]] = {}
    for item in least.values():
        alike.setdefault(item.reason, []).append(item)
    return [
        dataclasses.replace(first, layout=first.layout + (f" and {len(more)} more" if more else ""))
        for first, *more in alike.values()
    ]


def _stage(layout: str) -> str:
    """The layout without its ways."""
    return re.sub(r"(ZeRO \d).*", r"\1", layout)


def _table(title: str, rows: Rows, *, numbers: bool = True) -> None:
    """``numbers``: columns but the first are aligned to the right."""
    if sys.stdout.isatty():
        _rich(title, rows, numbers)
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"\n{title}")
    for row in rows:
        cells = [
            cell.rjust(width) if numbers and column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())


def _rich(title: str, rows: Rows, numbers: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column, name in enumerate(rows[0]):
        table.add_column(escape(name), justify="right" if numbers and column else "left")
    for number, row in enumerate(rows[1:]):
        table.add_row(*map(escape, row), style="bold" if numbers and not number and len(row) > 4 else None)
    Console().print(table)
