"""Generation by several ranks: what one process writes, whatever shares the experts and the prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moe_train.evaluation.generation.options import GenerationOptions
from moe_train.routing.options import RouterOptions
from moe_train.training.run_config import RunConfig, to_yaml
from tests.distributed.harness import generating
from tests.distributed.harness.expected import Processes
from tests.distributed.harness.training import MODEL, Case
from tests.distributed.test_parity import ROUTERS

PROMPTS = [[5, 6, 7], [40], [9] * 12, [5, 6, 7], [80, 2], [33, 3, 60, 61]]
OPTIONS = GenerationOptions(max_new_tokens=9, temperature=1.2, top_k=40, seed=5, stop=("~", "%"), batch_size=2)
LAYOUTS = [(2, 2), (2, 1), (4, 2)]


@pytest.mark.parametrize("gate", ROUTERS)
@pytest.mark.parametrize(("size", "expert"), [*LAYOUTS, pytest.param(4, 4, marks=pytest.mark.slow)])
def test_equals_one_process(processes: Processes, gate: str, size: int, expert: int) -> None:
    """Six prompts of different lengths in batches of two per rank, that end at different steps; with four ranks some
    have nothing but padding in the second batch. Every rank has all completions, in order."""
    case = Case(router=ROUTERS[gate])
    want = processes(1).run(generating.generate, case=case, prompts=PROMPTS, options=OPTIONS)[0]
    assert len(want) == len(PROMPTS) and len({len(completion.ids) for completion in want}) > 1
    got = processes(size).run(generating.generate, case=case.with_(expert=expert), prompts=PROMPTS, options=OPTIONS)
    assert got == [want] * size


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:3], []])
@pytest.mark.parametrize("use_cache", [True, False])
def test_ranks_without_prompts(processes: Processes, prompts: list[list[int]], use_cache: bool) -> None:
    options = dataclasses.replace(OPTIONS, use_cache=use_cache)
    want = processes(1).run(generating.generate, case=Case(), prompts=prompts, options=options)[0]
    got = processes(4).run(generating.generate, case=Case(expert=4), prompts=prompts, options=options)
    assert got == [want] * 4


def test_latent_attention_and_shared_experts(processes: Processes) -> None:
    from moe_train.model.options import LatentAttentionOptions

    model = dataclasses.replace(
        MODEL,
        family="deepseek_v3",
        latent_attention=LatentAttentionOptions(24, 16, 16, 8, 16),
        dense_layers=[0],
        ffn_hidden_size=64,
        moe=dataclasses.replace(MODEL.moe, shared_expert_hidden_size=32),
    )
    case = Case(model=model, router=RouterOptions())
    want = processes(1).run(generating.generate, case=case, prompts=PROMPTS, options=OPTIONS)[0]
    got = processes(2).run(generating.generate, case=case.with_(expert=2), prompts=PROMPTS, options=OPTIONS)
    assert got == [want] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_all_and_nobody_waits(processes: Processes, rank: int) -> None:
    options = dataclasses.replace(OPTIONS, stop=())
    want = processes(1).run(generating.generate, case=Case(), prompts=PROMPTS, options=options)[0]
    got = processes(2).run(
        generating.generate, timeout=60, case=Case(expert=2), prompts=PROMPTS, options=options, fail_on=rank
    )
    assert got == [want] * 2


@pytest.mark.parametrize("long", [0, 1])
def test_one_rank_warns_of_a_long_text_of_any(processes: Processes, long: int) -> None:
    """The prompts' ranks take turns: the long one is on one rank alone."""
    prompts = [[5, 6], [7, 8]]
    prompts[long] = [9] * 11
    kwargs = {"case": Case(expert=2), "prompts": prompts, "options": GenerationOptions(max_new_tokens=2)}
    [first, second] = processes(2).run(generating.warnings_of, trained_length=11, **kwargs)
    assert first.startswith("moe-train: warning: a text is longer than the 11 tokens") and first.count("\n") == 1
    assert not second
    assert processes(2).run(generating.warnings_of, trained_length=13, **kwargs) == ["", ""]


def test_the_python_api_is_for_a_process_alone(processes: Processes, tmp_path: Path) -> None:
    """Refused before anything collective, and the groups that are there stay sound."""
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig(model=MODEL)), encoding="utf-8")
    said = processes(2).run(generating.load_here, path=str(tmp_path))
    assert all("one of 2 that work together" in text for text in said)
    assert len(processes(2).run(generating.generate, case=Case(expert=2), prompts=PROMPTS, options=OPTIONS)[0]) == 6
