"""Evaluation of a model or an engine on every rank of a pool."""

from __future__ import annotations

from pathlib import Path

from moe_train.data.options import DataOptions
from moe_train.evaluation.result import EvaluationResult
from moe_train.training.evaluation_watchers import Watchers
from moe_train.training.options import TrainOptions
from moe_train.training.run_config import RunConfig
from moe_train.training.validation import ValidationSet
from tests.distributed.harness.training import Case, build_model, groups_of, make_engine


def run_config(case: Case, micro_batch: int) -> RunConfig:
    return RunConfig(
        model=case.model,
        router=case.router,
        data=DataOptions(sequence_length=case.length),
        train=TrainOptions(micro_batch_size=micro_batch),
    )


def evaluate_blend(case: Case, names: list[str], micro_batch: int, trace: Path) -> EvaluationResult:
    """A fresh model on several data sets, each a domain where documents have no labels, and the trace of it."""
    groups, config = groups_of(case), run_config(case, micro_batch)
    validation = ValidationSet(config, groups, names, cache=trace.parent, with_domains=True)  # type: ignore[arg-type]
    watchers = Watchers(config, groups, trace.parent, trace=trace)
    watching = watchers.start(validation.names, validation.members, validation.labels)
    return watchers.finish(validation.evaluate(build_model(case).eval(), watching))[0]


def evaluate(case: Case, prefix: str, micro_batch: int, in_engine: bool = False) -> EvaluationResult:
    """Validation of a fresh model, as it stands or inside an engine, on this rank's share of the data, with the details
    of its routing."""
    groups = groups_of(case)
    validation = ValidationSet(run_config(case, micro_batch), groups, prefix, cache=Path(prefix).parent)
    watchers = Watchers(run_config(case, micro_batch), groups, Path(prefix).parent)
    watching = watchers.start(validation.names, validation.members, validation.labels)
    if not in_engine:
        return watchers.finish(validation.evaluate(build_model(case).eval(), watching))[0]
    engine = make_engine(case, groups)
    try:
        engine.deepspeed.eval()
        return watchers.finish(validation.evaluate(engine, watching))[0]
    finally:
        engine.close()
