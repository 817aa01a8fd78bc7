"""What an experiment file may say, and that everything in it is checked before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.config.compose import EXPERIMENTS, comparisons, names, shipped_configs
from moe_train.config.errors import ConfigError
from moe_train.lab.compare import Request, prepare
from moe_train.lab.experiment import Budget, dotted, load_experiment
from moe_train.lab.overview import overview
from moe_train.lab.plan import check_processes, plan
from moe_train.routing import available_gates
from tests.unit.lab.experiments import planned, write


def test_arms_become_configurations(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    assert [(run.arm, run.seed) for run in runs] == [("plain", 1), ("free", 1), ("plain", 2), ("free", 2)]
    assert [run.config.router.gate for run in runs] == ["softmax_topk", "dynamic_k"] * 2
    assert all(run.config.seed == run.seed and run.config.name == run.arm for run in runs)
    assert all(run.config.train.steps == 8 for run in runs)
    assert runs[2].folder == tmp_path / "out" / "plain" / "seed_2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "did you mean seeds"),
        ({"budget": {"step": 3}}, "budget.step: unknown key"),
        ({"budget": {"steps": 3, "tokens": 4}}, "either steps or tokens"),
        ({"budget": {"steps": 0}}, "at least 1"),
        ({"budget": None}, "budget: is missing"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": []}, "different whole numbers"),
        ({"seeds": ["1"]}, "seeds.0: must be an integer"),
        ({"baseline": "other"}, "no arm 'other'"),
        ({"arms": {"plain": {}, "table.md": {}}}, "name of a file of the comparison itself"),
        ({"labels": {"other": "x"}}, "labels.other: no such arm"),
        ({"evaluation": {"dokuments": True}}, "did you mean evaluation.documents"),
        ({"evaluation": {"limit_batches": 0}}, "evaluation.limit_batches: must be at least 1"),
        ({"arms": {}}, "there is none"),
        ({"arms": {"a/b": {}}}, "names a folder"),
        ({"arms": {"plain": {"seed": 3}}, "baseline": None, "labels": None}, "arms.plain.seed: cannot be changed here"),
        (
            {"overrides": {"train": {"steps": 3}}},
            "overrides.train.steps: cannot be changed here: it follows from budget",
        ),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "wrong.yaml", **changes)
    with pytest.raises(ConfigError, match=r"wrong\.yaml") as error:
        load_experiment(str(path))
    assert message in str(error.value)


def test_the_problems_of_all_arms_come_at_once(tmp_path: Path) -> None:
    arms = {"a": {"router.options.top": 2}, "b": {"parts.router": "nothing"}, "c": {"train.lr": 1}, "d": {}}
    with pytest.raises(ConfigError) as error:
        planned(tmp_path, arms=arms, baseline="d", labels=None)
    text = str(error.value)
    assert "arms.a: router.options.top" in text and "arms.b: parts.router" in text and "optimizer.lr" in text
    assert "arms.d" not in text


def test_what_no_file_can_know(tmp_path: Path) -> None:
    path = str(write(tmp_path / "two.yaml"))
    _, _, experiment = load_experiment(path)
    with pytest.raises(ValueError, match="--only frei: no such arm"):
        prepare(Request(experiment=path, only=["frei"]))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file; .*--out"):
        prepare(Request(experiment=path, out=tmp_path / "file"))
    with pytest.raises(ConfigError, match="seed: cannot be changed here"):
        plan(experiment, tmp_path, source=path, overrides=["seed=3"])
    runs = plan(experiment, tmp_path, source=path, seeds=[7], overrides=["optimizer.lr=0.5"])
    assert [(run.arm, run.seed, run.config.optimizer.lr) for run in runs] == [("plain", 7, 0.5), ("free", 7, 0.5)]
    with pytest.raises(ConfigError, match=r"arms\.free.*global_batch_size"):
        check_processes(runs, 3, path)


def test_a_budget_of_tokens_is_rounded_up_to_steps(tmp_path: Path) -> None:
    """tiny: 4 sequences of 64 tokens."""
    assert planned(tmp_path, budget={"tokens": 1025})[0].config.train.steps == 5
    longer = {"plain": {"data.sequence_length": 128}, "free": {}}
    runs = planned(tmp_path, budget={"tokens": 1024}, arms=longer)
    assert [run.config.train.steps for run in runs[:2]] == [2, 4]
    assert Budget(tokens=1).steps_of(10) == 1


def test_dotted_keys_and_nested_ones_say_the_same() -> None:
    lines = dotted({"router": {"options": {"a": 1e-5, "b": [1, None]}, "balancing": {}}, "parts.router": "x y"})
    assert lines == [
        "router.options.a=1e-05",
        "router.options.b=[1, null]",
        "router.balancing={}",
        'parts.router="x y"',
    ]


def test_numbers_and_texts_survive(tmp_path: Path) -> None:
    arms = {"a": {"optimizer.lr": 1e-5, "data.train": "0123", "optimizer.betas": [0.5, 0.25]}}
    [run] = planned(tmp_path, arms=arms, seeds=[1], baseline=None, labels=None)
    assert run.config.optimizer.lr == 1e-5
    assert run.config.data.train == "0123"
    assert run.config.optimizer.betas == (0.5, 0.25)


def test_comparisons_are_no_experiments_of_one_run() -> None:
    assert not set(comparisons()) & set(names(EXPERIMENTS))
    with pytest.raises(ValueError, match=r"Did you mean lpr_table\b"):
        load_experiment("lpr_tabel")


@pytest.mark.parametrize("name", comparisons())
def test_shipped_comparisons_are_right(name: str) -> None:
    comparison = prepare(Request(experiment=name))
    assert len({str(run.config.router) + str(run.config.model) for run in comparison.everything}) == len(
        comparison.experiment.arms
    ), "two arms are the same"
    text = overview(comparison.title, comparison.experiment, comparison.chosen)
    assert all(arm in text for arm in comparison.experiment.arms)


def test_every_gate_has_an_arm() -> None:
    """Whoever adds a gate adds a line to configs/experiments/gates_small.yaml."""
    runs = prepare(Request(experiment="gates_small")).everything
    assert {run.config.router.gate for run in runs if run.arm != "dense_twin"} == set(available_gates())


def test_the_seven_rows_are_those_of_the_paper() -> None:
    configs = {run.arm: run.config for run in prepare(Request(experiment="lpr_table", seeds=[1])).everything}
    assert len(configs) == 7
    for config in configs.values():
        assert (config.train.steps, config.train.global_batch_size, config.data.sequence_length) == (4000, 270, 1024)
        assert (config.optimizer.lr, config.schedule.kind, config.schedule.warmup_steps) == (1e-3, "wsd", 200)
        assert config.data.sampler == "documents"
        assert (config.model.init.std, config.model.init.scaled_residual) == (0.02, False)
        assert config.model.vocab_size == 151_669
        assert config.router.options["top_k"] == 8


def test_the_micro_batches_of_the_seven_rows() -> None:
    """The published 10 x 27 and 15 x 18: their regularisers are taken over a micro-batch."""
    configs = {run.arm: run.config for run in prepare(Request(experiment="lpr_table", seeds=[1])).everything}
    sizes = {arm: config.train.micro_batch_size for arm, config in configs.items()}
    ten = {"mixtral_lpr", "qwen3_lpr_init", "qwen3_lpr"}
    assert sizes == {arm: 10 if arm in ten else 15 for arm in configs}


def test_the_page_names_every_control() -> None:
    """docs/compare.md describes the arms of lpr_controls_small by these words."""
    text = (shipped_configs().parent / "docs" / "compare.md").read_text(encoding="utf-8")
    section = text.split("### Arms of `lpr_controls_small`")[1].split("\n#")[0]
    _, _, experiment = load_experiment("lpr_controls_small")
    assert {arm for arm in experiment.arms if f"`{arm}`" not in section} == set()


@pytest.mark.parametrize("name", ["gates_small", "twin_small"])
def test_the_dense_twin_is_as_large_as_what_a_token_passes(name: str) -> None:
    from moe_train.training.account import active_parameters, gate_facts, parameters

    configs = {run.arm: run.config for run in prepare(Request(experiment=name)).everything}
    moe, dense = configs["softmax_topk"], configs["dense_twin"]
    assert active_parameters(dense) == active_parameters(moe) - moe.model.num_layers * gate_facts(moe).parameters
    assert moe.model.num_layers >= 4 and moe.model.moe.num_experts >= 16 and parameters(moe).total >= 3_000_000
