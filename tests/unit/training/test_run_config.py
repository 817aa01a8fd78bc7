"""The whole configuration: round trip, gate options, checks across sections."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from moe_train.config.compose import EXPERIMENTS, names
from moe_train.config.errors import ConfigError
from moe_train.routing import gate_class
from moe_train.routing.schedule import Ramp
from moe_train.training.run_config import check, from_dict, load_router, load_run_config, to_dict, to_yaml


def paths(*overrides: str, world_size: int | None = None) -> dict[str, str]:
    """The problems of the tiny experiment with these overrides, by key."""
    with pytest.raises(ConfigError) as caught:
        check(load_run_config("tiny", overrides), world_size)
    return {problem.path: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize("name", names(EXPERIMENTS))
def test_every_shipped_experiment_is_right(name: str) -> None:
    config = load_run_config(name)
    check(config, config.layout_size)


@pytest.mark.parametrize("name", names("router"))
def test_every_shipped_router_fits_the_demo(name: str) -> None:
    """Gates that look ahead only where the run names them (pitfall 41)."""
    gate = load_router(name).gate
    arguments = [f"parts.router={name}"]
    if not gate_class(gate).causal:
        with pytest.raises(ConfigError, match="depend on later tokens"):
            load_run_config("demo", arguments)
        arguments.append(f"causal_exceptions=[{gate}]")
    config = load_run_config("demo", arguments)
    check(config, config.layout_size)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load_run_config("demo", ["deepspeed.zero_optimization.overlap_comm=true", "optimizer.eps=1e-9"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_run_config(tmp_path / "config.yaml")
    assert again == config
    assert again.optimizer.eps == 1e-9 and again.optimizer.betas == (0.9, 0.95)


def test_the_resolved_configuration_holds_the_gates_defaults() -> None:
    assert to_dict(load_run_config("tiny"))["router"]["options"] == {
        "top_k": 2,
        "softmax": "before",
        "renormalize": True,
        "scaling": 1.0,
        "num_groups": 1,
        "groups_per_token": 1,
    }


def test_sizes_of_the_layout() -> None:
    config = load_run_config("demo", ["parallel.expert=4", "train.global_batch_size=32", "train.micro_batch_size=2"])
    assert config.layout_size == 4
    assert config.data_parallel_size(8) == 8
    assert config.accumulation_steps(8) == 2


def test_an_unknown_gate_lists_what_there_is() -> None:
    assert "did you mean softmax_topk?" in paths("router.gate=softmax_tok")["router.gate"]


def test_options_of_another_gate_name_the_allowed_ones() -> None:
    found = paths("router.options.latent_size=3")
    assert "unknown key" in found["router.options.latent_size"]
    assert "top_k" in found["router.options"] and "parts.router" in found["router.options"]


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("router.options.top_k=9", "router.options"),
        ("router.options.top_k=0", "router.options"),
        ("router.balancing.bias.rate=-1.0", ""),
        ("parallel.expert=3", "parallel.expert"),
        ("parallel.expert=0", "parallel.expert"),
        ("parallel.tensor=3", "parallel.tensor"),
        ("parallel.tensor=8", "parallel.tensor"),
        ("parallel.tensor=0", "parallel.tensor"),
        ("parallel.pipeline=2", "parallel.pipeline"),
        ("parallel.context=2", "parallel.context"),
        ("train.zero_stage=0", "train.zero_stage"),
        ("train.zero_stage=4", "train.zero_stage"),
        ("train.global_batch_size=5", "train.global_batch_size"),
        ("train.micro_batch_size=0", "train.micro_batch_size"),
        ("train.steps=0", "train.steps"),
        ("model.num_key_value_heads=3", "model.num_key_value_heads"),
        ("model.hidden_size=66", "model.hidden_size"),
        ("model.head_dim=15", "model.head_dim"),
        ("model.init.std=.nan", "model.init.std"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("model.moe.num_experts=0", "model.moe.num_experts"),
        ("model.moe.shared_expert_hidden_size=0", "model.moe.shared_expert_hidden_size"),
        ("schedule.decay_fraction=1.5", "schedule.decay_fraction"),
        ("schedule.warmup_steps=11", "schedule.warmup_steps"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas.1"),
        ("optimizer.lr=-1.0", "optimizer.lr"),
        ("name=a/b", "name"),
    ],
)
def test_impossible_values(override: str, path: str) -> None:
    assert path in paths(override)


def test_zero_0_says_use_stage_1() -> None:
    assert "use stage 1" in paths("train.zero_stage=0")["train.zero_stage"]


@pytest.mark.parametrize(
    ("world_size", "overrides", "path"),
    [
        (3, ["parallel.expert=2"], "parallel.expert"),
        (1, ["parallel.expert=2"], "parallel.expert"),
        (4, [], "train.global_batch_size"),
        (0, [], "parallel.expert"),
        (3, ["parallel.tensor=2"], "parallel.expert"),
        (2, ["parallel.tensor=2", "parallel.expert=4"], "parallel.expert"),
    ],
)
def test_the_number_of_processes(world_size: int, overrides: list[str], path: str) -> None:
    assert path in paths(*overrides, world_size=world_size)


def test_what_fits_passes() -> None:
    check(load_run_config("tiny", ["parallel.expert=2"]), 2)
    check(load_run_config("tiny", ["parallel.expert=4", "train.micro_batch_size=1"]), 4)
    # The ranks that share tensors read the same samples, and have different experts.
    for processes, expert in ((2, 1), (2, 2), (4, 2), (4, 4)):
        config = load_run_config("tiny", ["parallel.tensor=2", f"parallel.expert={expert}"])
        assert config.layout_size == max(2, expert) and config.data_parallel_size(processes) == processes // 2
        check(config, processes)


@pytest.mark.parametrize(
    ("overrides", "path", "says"),
    [
        (["model.num_key_value_heads=1"], "model.num_key_value_heads", "1 cannot be divided"),
        (["data.sequence_length=31"], "data.sequence_length", "31 cannot be divided"),
        (["model.moe.shared_expert_hidden_size=17"], "model.moe.shared_expert_hidden_size", "17 cannot be divided"),
        (["model.ffn_hidden_size=33", "model.dense_layers=[0]"], "model.ffn_hidden_size", "parallel.tensor=1"),
        (["model.family=olmoe"], "parallel.tensor", "over all heads"),
        (["train.offload_optimizer=cpu"], "train.offload_optimizer", "not tested"),
    ],
)
def test_what_tensor_parallelism_refuses(overrides: list[str], path: str, says: str) -> None:
    found = paths("parallel.tensor=2", *overrides)
    assert [says in message for key, message in found.items() if path in key] == [True]


def test_latent_attention_is_not_divided() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor: the latent attention of deepseek_v3"):
        load_run_config("deepseek_v3", ["parallel.tensor=2"])


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("train_batch_size", "8", "train.global_batch_size"),
        ("train_micro_batch_size_per_gpu", "8", "train.micro_batch_size"),
        ("gradient_accumulation_steps", "8", "train.global_batch_size"),
        ("zero_optimization.stage", "1", "train.zero_stage"),
        ("zero_optimization.memory_efficient_linear", "true", "twice"),
        ("bf16.enabled", "true", "train.precision"),
        ("fp16.enabled", "true", "train.precision"),
        ("gradient_clipping", "1.0", "train.gradient_clipping"),
        ("optimizer.type", "Adam", "optimizer section"),
        ("scheduler.type", "WarmupLR", "schedule section"),
        ("communication_data_type", "bf16", "float32"),
        ("data_types.grad_accum_dtype", "bf16", "float32"),
    ],
)
def test_deepspeed_keys_that_are_ours_are_refused(key: str, value: str, advice: str) -> None:
    (message,) = paths(f"deepspeed.{key}={value}").values()
    assert advice in message


def test_a_typo_of_a_deepspeed_key_is_refused() -> None:
    (message,) = paths("deepspeed.zero_optimisation.reduce_bucket_size=1000").values()
    assert "did you mean zero_optimization" in message
    (message,) = paths("deepspeed.zero_optimization=3").values()
    assert "section" in message


def test_rows_that_grouped_mm_refuses() -> None:
    sizes = ["model.hidden_size=60", "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.head_dim=16"]
    load_run_config("tiny", sizes)
    assert "multiple of 8" in paths(*sizes, "train.precision=bfloat16")["model.hidden_size"]


def test_other_deepspeed_keys_pass_through() -> None:
    config = load_run_config("tiny", ["deepspeed.zero_optimization.reduce_bucket_size=1000"])
    assert config.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}}


def test_a_table_of_token_ids_must_be_that_of_the_model() -> None:
    wrong = paths(
        "router.gate=hash", "router.options={vocab_size: 100}", "router.balancing.switch_loss.coefficient=0.0"
    )["router.options"]
    vocabulary = load_run_config("tiny").model.vocab_size
    assert f"set router.options.vocab_size={vocabulary}" in wrong
    fits = f"router.options={{vocab_size: {vocabulary}}}"
    assert (
        load_run_config("tiny", ["router.gate=hash", fits, "router.balancing.switch_loss.coefficient=0.0"]).router.gate
        == "hash"
    )


def test_training_needs_the_file_of_a_gate_and_a_checkpoint_does_not(tmp_path: Path) -> None:
    from moe_train.training.checks import check_gate_files

    path, vocabulary = tmp_path / "counts.json", load_run_config("tiny").model.vocab_size
    options = f"router.options={{vocab_size: {vocabulary}, counts: '{path}'}}"
    config = load_run_config(
        "tiny", ["router.gate=hash", options, "router.balancing.switch_loss.coefficient=0.0"]
    )  # what evaluation reads
    with pytest.raises(ValueError, match="there is no such file"):
        check_gate_files(config)
    path.write_text("[1]")
    check_gate_files(config)


def test_a_gate_that_looks_ahead_must_be_accepted_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_train.routing import gate_class

    monkeypatch.setattr(gate_class("softmax_topk"), "causal", False)
    assert "causal_exceptions=[softmax_topk]" in paths()["router.gate"]
    config = load_run_config("tiny", ["causal_exceptions=[softmax_topk]"])
    assert config.causal_exceptions == ["softmax_topk"]


def test_an_exception_that_is_none_is_said_with_the_nearest_name() -> None:
    found = paths("causal_exceptions=[sinkhorn,expert_choise]")["causal_exceptions"]
    assert "'expert_choise' is neither a gate nor capacity; did you mean 'expert_choice'?" in found
    assert "did you mean 'capacity'" in paths("causal_exceptions=[capacty]")["causal_exceptions"]
    load_run_config("tiny", ["causal_exceptions=[sinkhorn,capacity]"])  # for arms that another gate joins


def test_a_capacity_that_looks_ahead_must_be_accepted_by_name() -> None:
    """By position it does not, but for a gate without a bound on k; in evaluation as in training."""
    assert load_run_config("tiny", ["router.capacity.factor=1.25"]).router.capacity.factor == 1.25
    by_probability = ["router.capacity.drop=probability"]
    load_run_config("tiny", by_probability)
    free = ["parts.router=dynamic_k", "router.options.max_k=null", "router.capacity.factor=1.25"]
    for further in (
        [*by_probability, "router.capacity.factor=1.25"],
        [*by_probability, "router.capacity.evaluation_factor=2"],
        free,
    ):
        assert "causal_exceptions" in paths(*further)["router.capacity"]
        load_run_config("tiny", [*further, "causal_exceptions=[capacity]"])


def test_scheduled_coefficients_of_balancing() -> None:
    ramp = "{start: 0.1, end: 0.01, steps: 50}"
    config = load_run_config(
        "tiny", [f"router.balancing.switch_loss.coefficient={ramp}", f"router.balancing.z_loss={ramp}"]
    )
    assert config.router.balancing.switch_loss.coefficient == config.router.balancing.z_loss == Ramp(0.1, 0.01, 50)
    assert from_dict(to_dict(config)) == config
    assert "steps" in paths("router.balancing.z_loss={start: 0.1, steps: 0}")["router.balancing.z_loss"]
    assert "negative" in "".join(paths("router.balancing.z_loss={start: 0.1, end: -0.1, steps: 5}").values())
    assert "router.balancing.z_loss.stop" in paths("router.balancing.z_loss={start: 0.1, stop: 0}")


BLENDS = [
    "data/a",
    ["data/a", "data/b"],
    [{"path": "data/a", "weight": 0.7}, {"path": "data/b", "weight": 3}],
]


@pytest.mark.parametrize("blend", BLENDS)
def test_blends_and_stages_are_read_back(tmp_path: Path, blend: object) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"data": {"train": blend, "stages": [{"from_step": 3, "train": blend}]}}))
    config = load_run_config(path)
    assert to_dict(config)["data"]["train"] == blend
    path.write_text(to_yaml(config))
    assert load_run_config(path) == config and config.data.stages[0].from_step == 3
    assert load_run_config("tiny", ["data.train=[x/a,x/b]"]).data.train == ["x/a", "x/b"]


@pytest.mark.parametrize(
    ("data", "path", "message"),
    [
        ({"train": [{"path": "a", "weight": 0}]}, "data.train", "weight of a must be a number greater than 0, got 0"),
        ({"train": [{"path": "a", "weight": -1.5}]}, "data.train", "greater than 0, got -1.5"),
        ({"train": ["a", {"path": "b", "weight": 1}]}, "data.train", "some members have weights and some do not"),
        ({"train": ["a", "b", "a"]}, "data.train", "a stands in it 2 times"),
        ({"train": []}, "data.train", "names no data set"),
        ({"train": ["a", " "]}, "data.train", "a member has no name"),
        ({"validation": [{"path": "a", "weight": 0}]}, "data.validation", "greater than 0"),
        ({"stages": [{"from_step": 0, "train": "a"}]}, "data.stages.0.from_step", "greater than 0 .data.train is what"),
        (
            {"stages": [{"from_step": 5, "train": "a"}, {"from_step": 5, "train": "b"}]},
            "data.stages.1.from_step",
            "greater than 5 .the stage before begins at step 5.*got 5",
        ),
        ({"stages": [{"from_step": 5, "train": ""}]}, "data.stages.0.train", "names no data set"),
        (
            {"stages": [{"from_step": 5, "train": "a"}, {"from_step": 100, "train": ["b", "c"]}]},
            "data.stages.1.from_step",
            r"the stage b \+ c would begin after 100 steps, but train.steps is 100",
        ),
        ({"sampler": "documents", "reset_at_documents": True}, "data.reset_at_documents", "belongs to .* packed"),
        ({"pack_documents": True}, "data.pack_documents", "belongs to data.sampler: documents"),
        ({"index_cache": "x"}, "data.index_cache", "packed has no index"),
    ],
)
def test_data_that_makes_no_sense(tmp_path: Path, data: dict[str, object], path: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"data": data}))
    with pytest.raises(ConfigError) as caught:
        load_run_config(file)
    [problem] = [problem for problem in caught.value.problems if problem.path == path]
    assert re.search(message, problem.message)


@pytest.mark.parametrize(
    ("data", "problems"),
    [
        (
            {"train": [{"path": "a", "wieght": 1}]},
            {"data.train.0.weight": "is missing", "data.train.0.wieght": "unknown key, got 1"},
        ),
        ({"train": ["b", {"path": "a", "weight": 1, "share": 2}]}, {"data.train.1.share": "unknown key, got 2"}),
        (
            {"stages": [{"from_step": 1, "train": "a", "validation": "b"}]},
            {"data.stages.0.validation": 'unknown key, got "b"'},
        ),
        ({"sampler": "windows"}, {"data.sampler": "must be 'packed' or 'documents', got \"windows\""}),
        ({"train": 3}, {"data.train": "must be a string or a list, got 3"}),
        ({"train": ["a", 3]}, {"data.train.1": "must be a string or a section, got 3"}),
    ],
)
def test_data_with_unknown_keys_and_types(tmp_path: Path, data: dict[str, object], problems: dict[str, str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"data": data}))
    with pytest.raises(ConfigError) as caught:
        load_run_config(file)
    assert {problem.path: problem.message for problem in caught.value.problems} == problems


def test_an_unknown_router_is_named_by_its_option() -> None:
    with pytest.raises(ConfigError, match="--router softmax_topp: 1 problem") as caught:
        load_router("softmax_topp")
    assert "lpr_bias" in str(caught.value) and "did you mean softmax_top" in str(caught.value)
    assert "tiny" not in str(caught.value)
