"""Imported models on every rank of a pool."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moe_train.checkpoint.saver import Saver
from moe_train.checkpoint.store import checkpoint_at
from moe_train.evaluation.generation.completion import complete
from moe_train.evaluation.generation.loop import TextGenerator
from moe_train.evaluation.generation.options import GenerationOptions
from moe_train.evaluation.generation.text import Vocabulary
from moe_train.model.language_model import LanguageModel, build_language_model
from moe_train.model.micro_batch import MicroBatch, use
from moe_train.routing.interface import TokenBatch
from moe_train.training.engine import Engine
from moe_train.training.options import OptimizerOptions, TrainOptions
from moe_train.training.run_config import RunConfig, to_dict
from moe_train.training.run_folder import load
from moe_train.training.state import load_initial_weights, load_weights, run_slices, run_state
from tests.distributed.harness.training import groups_for


def _model(config: RunConfig, seed: int) -> LanguageModel:
    return build_language_model(config.model, config.router, sequence_length=config.data.sequence_length, seed=seed)


def forward(model: LanguageModel, ids_BS: Tensor) -> Tensor:
    """Logits [B, S, V]."""
    batch, sequence = ids_BS.shape
    tokens = TokenBatch(
        ids_T=ids_BS.t().reshape(-1),
        sample_T=torch.arange(batch).repeat(sequence),
        position_T=torch.arange(sequence).repeat_interleave(batch),
        padding_T=torch.zeros(batch * sequence, dtype=torch.bool),
        sequence_length=sequence,
        batch_size=batch,
    )
    with torch.no_grad(), use(MicroBatch(tokens)):
        return model.eval()(ids_BS)  # type: ignore[no-any-return]


def logits(run: str, ids_BS: Tensor, expert: int) -> Tensor:
    """Of the weights in a run's folder, loaded over other initial weights."""
    config, groups = load(Path(run)), groups_for(expert)
    model = _model(config, seed=7)
    load_weights(model, groups, checkpoint_at(Path(run)))
    return forward(model, ids_BS)


def greedy(run: str, prompts: list[list[int]], expert: int, count: int) -> list[list[int]]:
    """The most likely continuations, by our own loop with its cache."""
    config, groups = load(Path(run)), groups_for(expert)
    model = _model(config, seed=7)
    load_weights(model, groups, checkpoint_at(Path(run)))
    nothing = Vocabulary([b""] * config.model.vocab_size, frozenset())
    completions = complete(
        TextGenerator(model.eval(), groups, nothing), prompts, GenerationOptions(max_new_tokens=count)
    )
    return [completion.ids for completion in completions]


def names_and_shapes(run: str) -> dict[str, tuple[int, ...]]:
    """Everything that the real model keeps."""
    groups_for(1)
    model = _model(load(Path(run)), seed=0)
    kept = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in model.state_dict())]
    return {name: tuple(value.shape) for name, value in kept}


def begin_and_save(run: str, root: str, expert: int, zero: int, precision: str) -> None:
    """An engine that begins with the weights of a run's folder, saved as if it had trained."""
    config, groups = load(Path(run)), groups_for(expert)
    train = TrainOptions(
        global_batch_size=8,
        micro_batch_size=1,
        zero_stage=zero,
        precision=precision,  # type: ignore[arg-type]
    )
    persistence = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if zero == 3 else {}
    engine = Engine(_model(config, seed=7), groups, train, OptimizerOptions(), persistence)
    load_initial_weights(engine, checkpoint_at(Path(run)))
    plain = to_dict(config) | {"train": to_dict(RunConfig(train=train))["train"]}
    state = run_state(engine, consumed=24, tokens=0, samples={}, config=plain)
    Saver(Path(root)).save(3, run_slices(engine), state)
    engine.close()
