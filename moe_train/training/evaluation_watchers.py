"""What ``moe-train evaluate`` looks at besides the loss: routing in detail, the trace file, another checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moe_train.checkpoint.state import read_state
from moe_train.evaluation import trace_file
from moe_train.evaluation.result import EvaluationResult
from moe_train.evaluation.routing_details import RoutingDetails
from moe_train.evaluation.stability import RoutingStability
from moe_train.model.families import evaluated_moe_layers
from moe_train.parallel.groups import Groups
from moe_train.routing.registry import blank_gate
from moe_train.training.loading import find_checkpoint, load_model, run_and_checkpoint, with_layout_for
from moe_train.training.run_config import RunConfig
from moe_train.training.run_folder import load
from moe_train.training.validation import Watcher, forward_function


class Watchers:
    """Made before the evaluation, started when its data are known, finished after it; every rank must do all three.

    trace: parquet file to write, on a file system that all ranks share.   against: checkpoint whose routing is compared
    (latest, a step, or a path: a checkpoint or a run folder). ValueError for these in a model without experts, or where
    the other model has other layers with experts, another number of experts or another vocabulary.
    """

    def __init__(
        self, config: RunConfig, groups: Groups, run_dir: Path, *, trace: Path | None = None, against: str | None = None
    ) -> None:
        self.config, self.groups, self.trace_path = config, groups, trace
        self.layers = evaluated_moe_layers(config.model)
        if (trace or against) and not self.layers:
            raise ValueError("this model has no layers with experts: there is no routing to trace or to compare")
        self.details: RoutingDetails | None = None
        if self.layers:
            experts = config.model.moe.num_experts
            self.details = RoutingDetails(
                blank_gate(config.router.gate, config.router.options, experts),
                len(self.layers),
                experts,
                device=groups.device,
                rank=groups.data_rank,
                ranks=groups.data_size,
            )
        self.stability: RoutingStability | None = None
        self.against: dict[str, Any] = {}
        if against:
            self._load(run_dir, against)
        self.trace: trace_file.TraceWriter | None = None

    def _load(self, run_dir: Path, against: str) -> None:
        named = against == "latest" or against.isdigit()
        if named:
            other_run, directory = run_dir, find_checkpoint(run_dir, against)
        else:
            other_run, directory = run_and_checkpoint(Path(against))
        other = with_layout_for(load(other_run), self.groups.world_size)
        for what, ours, theirs in (
            ("layers with experts", self.layers, evaluated_moe_layers(other.model)),
            ("experts", self.config.model.moe.num_experts, other.model.moe.num_experts),
            ("tokens in the vocabulary", self.config.model.vocab_size, other.model.vocab_size),
        ):
            if ours != theirs:
                raise ValueError(f"{directory} cannot be compared: {what} {theirs}, here {ours}")
        model = load_model(other, self.groups, directory).model
        forward = forward_function(model, self.groups)
        self.stability = RoutingStability(
            forward, len(self.layers), self.config.model.moe.num_experts, self.groups.device
        )
        self.against = {"checkpoint": str(directory), "step": read_state(directory)["step"]}

    def start(
        self, names: Sequence[str], members: Callable[[Tensor], Tensor], domains: Sequence[str] | None
    ) -> list[Watcher]:
        """Those that look at each batch. ``names``: of the data sets; ``members``: samples [B] to their data set."""
        if self.trace_path is not None:
            part = trace_file.part_of(self.trace_path, self.groups.data_rank, self.groups.data_size)
            self.trace = trace_file.TraceWriter(part, self.layers, names, members, domains)
        return [watcher for watcher in (self.details, self.stability, self.trace) if watcher is not None]

    def finish(self, result: EvaluationResult) -> tuple[EvaluationResult, dict[str, Any]]:
        """The result with what was seen, and further keys of docs/evaluation.md."""
        reduce = self.groups.sum_over_data
        more: dict[str, Any] = {}
        if self.details is not None:
            result = self.details.add_to(result, reduce)
        if self.stability is not None:
            more["stability"] = {**self.against, **self.stability.to_json(self.layers, reduce)}
        if self.trace is not None and self.trace_path is not None:
            self.trace.close()
            dist.barrier(self.groups.data)
            if self.groups.data_rank == 0:
                trace_file.join(self.trace_path, self.groups.data_size)
        return result, more
