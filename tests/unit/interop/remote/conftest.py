"""One process, and exports of random models."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_train.model.language_model import LanguageModel
from moe_train.model.options import (
    ModelOptions,
)
from moe_train.parallel.groups import initialize
from moe_train.parallel.options import ParallelOptions
from moe_train.routing.options import RouterOptions
from moe_train.training.convert import Report, export_model
from tests.unit.interop.remote.models import (
    Exported,
    random_model,
    saved,
)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    initialize(ParallelOptions())
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> Iterator[None]:
    """One for each test, whatever ran before it: among fresh models and prompts, now and then a token's experts are
    chosen by the last bit of a score, and then both sides are right with different logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(request.node.name.encode()))
        yield


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    def export(model: ModelOptions, router: RouterOptions, form: Any = "custom") -> tuple[LanguageModel, Path, Report]:
        built = random_model(model, router)
        run = saved(tmp_path / "run", built, model, router)
        report = export_model(run, tmp_path / "hub", form=form, shard_bytes=100_000)
        return built, tmp_path / "hub", report

    return export
