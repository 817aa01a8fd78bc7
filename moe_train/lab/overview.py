"""What ``moe-train compare --dry-run`` prints: every arm with its size and length."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.evaluation.summary import big_number
from moe_train.lab.experiment import Experiment
from moe_train.lab.plan import PlannedRun
from moe_train.training.account import active_parameters, flops_per_token, gate_facts, parameters
from moe_train.training.run_config import RunConfig

COLUMNS = ("arm", "gate", "parameters", "active", "MFLOP/token", "steps", "tokens", "label")


def overview(title: str, experiment: Experiment, runs: Sequence[PlannedRun]) -> str:
    """Lines for the terminal. Nothing is allocated."""
    configs = {run.arm: run.config for run in runs}
    rows = [COLUMNS, *(_row(arm, config, experiment.label(arm)) for arm, config in configs.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [f"{title}: {len(configs)} arms, seeds {_listed(runs)}, {len(runs)} runs", ""]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[2:-1], widths[2:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), *cells, row[-1]]).rstrip())
    tokens = sum(expected_tokens(run.config) for run in runs)
    flops = sum(flops_per_token(run.config).total * expected_tokens(run.config) for run in runs)
    documents = any(config.data.sampler == "documents" for config in configs.values())
    lines += [
        "",
        f"all runs: {big_number(tokens)} tokens{' at most (documents are padded)' if documents else ''}, "
        f"{flops:.3g} FLOPs",
        f"evaluation: {_evaluation(runs)}",
        "MFLOP/token: forward and backward",
        "a gate of varying k: active, MFLOP/token are at the mean that it aims at or its bound; in the table at "
        "its measured mean k",
    ]
    return "\n".join(lines)


def expected_tokens(config: RunConfig) -> int:
    """Positions that the training passes; fewer tokens where documents are padded."""
    return config.train.steps * config.train.global_batch_size * config.data.sequence_length


def _row(arm: str, config: RunConfig, label: str) -> tuple[str, ...]:
    gate = config.router.gate if gate_facts(config).experts_per_token else "(dense)"
    return (
        arm,
        gate,
        f"{parameters(config).total:,}",
        f"{active_parameters(config):,}",
        f"{flops_per_token(config).total / 1e6:,.1f}",
        f"{config.train.steps:,}",
        f"{expected_tokens(config):,}",
        label if label != arm else "",
    )


def _listed(runs: Sequence[PlannedRun]) -> str:
    return ", ".join(map(str, dict.fromkeys(run.seed for run in runs)))


def _evaluation(runs: Sequence[PlannedRun]) -> str:
    from moe_train.data.options import label_of

    protocol = runs[0].protocol
    data = protocol.data or label_of(runs[0].config.data.validation)
    how = f"documents, cut at {protocol.max_length} tokens" if protocol.documents else "windows of the text"
    limit = f", {protocol.limit_batches} batches per process" if protocol.limit_batches else ""
    return f"{data}, {how}{limit}"
