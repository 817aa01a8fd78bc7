"""Exports with a modelling file of their own: loaded by transformers, they compute what our model computes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.checkpoint.streaming import LazyBox, write_weights
from moe_train.evaluation.result import write_evaluation
from moe_train.interop.forms import hub_form
from moe_train.interop.remote.bundle import bundle
from moe_train.model.families import evaluated_moe_layers
from moe_train.model.language_model import LanguageModel, build_language_model
from moe_train.model.options import (
    InitOptions,
    LatentAttentionOptions,
    ModelOptions,
    MoEOptions,
    MultiTokenOptions,
    RopeScaling,
)
from moe_train.parallel.groups import initialize
from moe_train.parallel.options import ParallelOptions
from moe_train.routing import Gate, SoftmaxTopKGate, SoftmaxTopKOptions, available_gates, register_gate
from moe_train.routing.options import BalancingOptions, BiasOptions, RouterOptions
from moe_train.routing.registry import _GATES
from moe_train.training.convert import Report, export_model
from moe_train.training.options import TrainOptions
from moe_train.training.run_config import RunConfig, to_dict
from tests.distributed.harness.interop import forward
from tests.reference import hub

transformers = pytest.importorskip("transformers")

VOCAB = 101
MODEL = ModelOptions(
    num_layers=3,
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    vocab_size=VOCAB,
    init=InitOptions(std=0.2, scaled_residual=False),
    moe=MoEOptions(num_experts=8, expert_hidden_size=24),
)
LATENT = LatentAttentionOptions(20, 16, 12, 6, 10)
FAMILIES = {
    "qwen3_moe": replace(MODEL, dense_layers=[1], ffn_hidden_size=40),
    "mixtral": replace(MODEL, family="mixtral", tie_embeddings=True, rope_scaling=RopeScaling("llama3", 8.0, 32)),
    "olmoe": replace(
        MODEL,
        family="olmoe",
        clip_qkv=0.7,
        head_dim=None,
        moe=replace(MODEL.moe, shared_expert_hidden_size=12),
        rope_scaling=RopeScaling("linear", 4.0),
    ),
    "deepseek_v3": replace(
        MODEL,
        family="deepseek_v3",
        latent_attention=LATENT,
        rope_scaling=RopeScaling("yarn", 8.0, 64, mscale=0.7, mscale_all_dim=0.6),
        multi_token=MultiTokenOptions(layers=1),
    ),
    "deepseek_v3, direct queries": replace(
        MODEL, family="deepseek_v3", latent_attention=LatentAttentionOptions(None, 16, 6, 8, 20, False)
    ),
}
DENSE = {
    "qwen3": replace(MODEL, family="qwen3", ffn_hidden_size=40),
    "llama3": replace(MODEL, family="llama3", ffn_hidden_size=40, rope_scaling=RopeScaling("llama3", 8.0, 32)),
}
BIAS = BalancingOptions(bias=BiasOptions(rate=0.001))
ROUTERS: dict[str, RouterOptions] = {
    "softmax_topk": RouterOptions("softmax_topk", {"top_k": 2}, BIAS),
    "lpr": RouterOptions("lpr", {"top_k": 2, "latent_dim": 4}, BIAS),
    "dynamic_k": RouterOptions("dynamic_k", {"threshold": 0.6}),
    "sigmoid_topk": RouterOptions("sigmoid_topk", {"top_k": 2, "num_groups": 4, "groups_per_token": 2}, BIAS),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    initialize(ParallelOptions())
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def random_model(model: ModelOptions, router: RouterOptions) -> LanguageModel:
    built = build_language_model(model, router, sequence_length=32, seed=int(torch.randint(1000, ()))).eval()
    with torch.no_grad():
        for name, value in (*built.named_parameters(), *built.named_buffers()):
            if name.endswith("bias_E"):
                value.normal_(std=0.3)
            elif value.dim() == 1:
                value.copy_(1 + 0.3 * torch.randn_like(value))
    return built


def saved(
    run: Path, built: LanguageModel, model: ModelOptions, router: RouterOptions, precision: Any = "float32"
) -> Path:
    """A run's folder with the weights of a model."""
    state = {name: value.detach() for name, value in built.state_dict().items() if value is not None}
    boxes = [
        LazyBox(f"model.{n}", tuple(v.shape), (0,) * v.dim(), tuple(v.shape), v.dtype, lambda v=v: v.contiguous())
        for n, v in state.items()
        if not (model.tie_embeddings and n == "output_layer.weight")
    ]
    config = RunConfig(name="a_run", model=model, router=router, train=TrainOptions(precision=precision))
    write_weights(run / "checkpoints", 7, boxes, {"config": to_dict(config)})
    return run


Exported = Callable[..., tuple[LanguageModel, Path, Report]]


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    def export(model: ModelOptions, router: RouterOptions, form: Any = "custom") -> tuple[LanguageModel, Path, Report]:
        built = random_model(model, router)
        run = saved(tmp_path / "run", built, model, router)
        report = export_model(run, tmp_path / "hub", form=form, shard_bytes=100_000)
        return built, tmp_path / "hub", report

    return export


def load(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    return model.eval()


def greedy(model: LanguageModel, ids_BS: Tensor, count: int) -> tuple[Tensor, float]:
    """Our own continuation without a cache, and the smallest lead of a chosen token."""
    lead = float("inf")
    for _ in range(count):
        last_BV = forward(model, ids_BS)[:, -1]
        best = last_BV.topk(2).values
        lead = min(lead, float((best[:, 0] - best[:, 1]).min()))
        ids_BS = torch.cat([ids_BS, last_BV.argmax(-1, keepdim=True)], dim=1)
    return ids_BS, lead


MODELS = [(name, gate) for name in FAMILIES for gate in available_gates()] + [(name, "softmax_topk") for name in DENSE]


@pytest.mark.parametrize(("family", "gate"), MODELS)
def test_logits_and_generation(exported: Exported, family: str, gate: str) -> None:
    """Every registered gate in every family, also from several files, tied, mixed, with padding on the left."""
    model = (FAMILIES | DENSE)[family]
    built, folder, report = exported(model, ROUTERS[gate])
    theirs = load(folder)
    ids_BS = torch.randint(1, VOCAB, (3, 20))
    want = forward(built, ids_BS)
    result = theirs(ids_BS, output_router_logits=True)
    assert (result.logits - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))
    assert len(result.router_logits) == len(evaluated_moe_layers(model))

    continued, lead = greedy(built, ids_BS, 5)
    generated = theirs.generate(ids_BS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, continued) or lead < 1e-4
    padding = torch.zeros(3, 4, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(ids_BS)], dim=1)
    padded = theirs(torch.cat([padding, ids_BS], dim=1), attention_mask=mask).logits[:, 4:]
    assert (padded - want).abs().max() <= 1e-4
    left_out = any("multi-token prediction is left out" in note for note in report.notes)
    assert left_out == bool(model.multi_token.layers)


@pytest.mark.parametrize("asked", ["auto", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_selection_bias_is_float32_everywhere(tmp_path: Path, family: str, asked: str) -> None:
    """Its steps are smaller than bfloat16 tells apart at its size (pitfalls row 12)."""
    model, router = replace(FAMILIES[family], multi_token=MultiTokenOptions()), ROUTERS["sigmoid_topk"]
    built = random_model(model, router)
    want_E = 0.5 + 0.001 * torch.randperm(8)
    biases = [value for name, value in built.named_buffers() if name.endswith("bias_E")]
    for bias_E in biases:
        bias_E.copy_(want_E)
    run = saved(tmp_path / "run", built, model, router, "bfloat16")
    export_model(run, tmp_path / "hub", form="custom", dtype=asked, shard_bytes=10**9)
    stored = hub.tensors(tmp_path / "hub")
    kept = {name: value for name, value in stored.items() if value.dtype == torch.float32}
    assert {name for name in stored if name.endswith("bias_E")} == set(kept) and len(kept) == len(biases) > 0
    assert all(torch.equal(value, want_E) for value in kept.values())
    for options in ({"dtype": torch.bfloat16}, {"dtype": "auto"}, {"dtype": torch.float16}):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub", trust_remote_code=True, **options)
        assert theirs.dtype == (torch.float16 if options["dtype"] == torch.float16 else torch.bfloat16)
        for moved in (theirs, theirs.to(torch.bfloat16)):
            loaded = [value for name, value in moved.named_buffers() if name.endswith("bias_E")]
            assert len(loaded) == len(biases) and all(torch.equal(value, want_E) for value in loaded)


def test_what_a_gate_moves_by_rule_is_no_weight() -> None:
    """The names whose type no export changes: the selection bias, and a gate's own buffers."""

    class Counting(SoftmaxTopKGate):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.register_buffer("seen_E", torch.zeros(self.num_experts))

    register_gate("counting", SoftmaxTopKOptions)(Counting)
    try:
        router = RouterOptions("counting", balancing=BIAS)
        layout = hub_form(FAMILIES["qwen3_moe"], router, "custom", max_length=8, dtype=torch.float32).layout
    finally:
        del _GATES["counting"]
    names = {f"decoder.layers.{layer}.mlp.router.{name}" for layer in (0, 2) for name in ("bias_E", "gate.seen_E")}
    assert layout.states == names


@pytest.mark.parametrize(("family", "gate"), [("qwen3_moe", "lpr"), ("deepseek_v3", "dynamic_k"), ("olmoe", "lpr")])
def test_a_static_cache(exported: Exported, family: str, gate: str) -> None:
    """As without a cache; also with padding on the left, which gates must go on seeing as padding."""
    _, folder, _ = exported(FAMILIES[family], ROUTERS[gate])
    theirs = load(folder)
    ids_BS = torch.randint(1, VOCAB, (3, 12))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :5] = 0
    seen = []
    theirs.model.layers[0].mlp.gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].padding_T.sum()))
    options = {"attention_mask": mask_BS, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    want = theirs.generate(ids_BS, use_cache=False, **options)
    seen.clear()
    result = theirs.generate(ids_BS, cache_implementation="static", **options)
    assert type(result.past_key_values).__name__ == "StaticCache"
    assert seen == [5] + [0] * 5
    # Where a token leads by little, the texts part: logits up to the first that differs are of the same text.
    differs = (result.sequences != want.sequences).any(0)[12:].tolist()
    for step in range(differs.index(True) + 1 if any(differs) else 6):
        assert (result.logits[step] - want.logits[step]).abs().max() < 1e-4


def test_embeddings_in_place_of_ids(exported: Exported) -> None:
    _, folder, _ = exported(FAMILIES["qwen3_moe"], ROUTERS["lpr"])
    theirs = load(folder)
    ids_BS = torch.randint(1, VOCAB, (2, 9))
    embeds_BSH = theirs.get_input_embeddings()(ids_BS)
    want = theirs(ids_BS)
    assert torch.equal(theirs(inputs_embeds=embeds_BSH).logits, want.logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        theirs.generate(inputs_embeds=embeds_BSH, **options), theirs.generate(ids_BS, **options)[:, ids_BS.shape[1] :]
    )
    for wrong in ({}, {"input_ids": ids_BS, "inputs_embeds": embeds_BSH}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            theirs(**wrong)
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        theirs(ids_BS, attention_mask=torch.ones(2, 1, 9, 9))
    for reads in (lambda ids_T: ids_T % 8, lambda ids_T: torch.arange(VOCAB)[ids_T], lambda ids_T: ids_T.shape):
        hook = theirs.model.layers[0].mlp.gate.register_forward_pre_hook(lambda _, i, f=reads: f(i[1].ids_T) and None)
        with pytest.raises(ValueError, match="input_ids are needed"):
            theirs(inputs_embeds=embeds_BSH)
        hook.remove()


def test_what_it_returns_on_request(tmp_path: Path) -> None:
    """As the class of transformers that computes the same model."""
    router = RouterOptions("softmax_topk", {"top_k": 2})
    run = saved(tmp_path / "run", random_model(MODEL, router), MODEL, router)
    models = []
    for form in ("stock", "custom"):
        export_model(run, tmp_path / form, form=form, shard_bytes=10**9)
        models.append(load(tmp_path / form))
    ids_BS = torch.randint(1, VOCAB, (2, 9))
    stock, ours = (model(ids_BS, output_hidden_states=True) for model in models)
    assert stock.past_key_values.get_seq_length() == ours.past_key_values.get_seq_length() == 9
    assert len(stock.hidden_states) == len(ours.hidden_states) == MODEL.num_layers + 1
    for want, got in zip(stock.hidden_states, ours.hidden_states, strict=True):
        assert (want - got).abs().max() < 1e-4
    for options in ({}, {"labels": ids_BS}, {"use_cache": False}, {"labels": ids_BS, "output_hidden_states": True}):
        pair = [model(ids_BS, return_dict=False, **options) for model in models]
        assert [type(value) for value in pair[0]] == [type(value) for value in pair[1]]
        tensors = [[value for value in values if isinstance(value, Tensor)] for values in pair]
        for want, got in zip(*tensors, strict=True):
            assert want.shape == got.shape and (want - got).abs().max() < 1e-4
    config = models[1].config
    config.use_cache, config.output_hidden_states, config.return_dict = False, True, False
    assert [type(value) for value in models[1](ids_BS)] == [Tensor, tuple]


@pytest.mark.parametrize("gate", available_gates())
def test_a_new_model_from_its_configuration(exported: Exported, gate: str) -> None:
    family = "deepseek_v3" if gate == "sigmoid_topk" else "qwen3_moe"
    _, folder, _ = exported(FAMILIES[family], ROUTERS[gate])
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        new, other = (
            transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
            for _ in range(2)
        )
    ids_BS = torch.randint(1, VOCAB, (2, 9))
    result = new(ids_BS, labels=ids_BS)
    assert result.logits.isfinite().all()
    result.loss.backward()
    different = dict(other.named_parameters())
    for name, value in new.named_parameters():
        if value.dim() == 1:
            assert (value == (0 if name.endswith("bias") else 1)).all(), name
        elif name.endswith("prototypes"):
            assert 0.5 < float(value.std()) < 1.5, name  # the gate's own choice, 1
        else:
            assert 0.15 < float(value.std()) < 0.25, name  # model.init.std is 0.2
        assert value.dim() == 1 or not torch.equal(value, different[name]), name
    assert not any(value.any() for value in new.buffers())


def test_what_a_file_lacks_begins_anew(exported: Exported) -> None:
    """And nothing else: what was loaded is not drawn again."""
    from safetensors.torch import save_file

    _, folder, _ = exported(FAMILIES["deepseek_v3"], ROUTERS["lpr"])
    stored = hub.tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    lacks = ["model.layers.1.mlp.gate.prototypes", "model.layers.2.mlp.bias_E", "model.layers.0.mlp.experts.down_proj"]
    kept = {name: value for name, value in stored.items() if name not in lacks}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    loaded = theirs.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in kept.items())
    prototypes_EL, bias_E, experts_EHF = (loaded[name] for name in lacks)
    assert 0.5 < float(prototypes_EL.std()) < 1.5 and not bias_E.any()
    assert 0.15 < float(experts_EHF.std()) < 0.25


def test_it_needs_torch_and_transformers_alone(exported: Exported, tmp_path: Path) -> None:
    built, folder, _ = exported(FAMILIES["qwen3_moe"], ROUTERS["lpr"])
    ids_BS = torch.randint(1, VOCAB, (2, 11))
    torch.save({"ids": ids_BS, "logits": forward(built, ids_BS)}, tmp_path / "want.pt")
    code = f"""
import sys
for name in ("moe_train", "deepspeed", "megatron", "pydantic", "pyarrow", "omegaconf"):
    sys.modules[name] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM
want = torch.load({str(tmp_path / "want.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True, dtype=torch.float32).eval()
with torch.no_grad():
    assert (model(want["ids"]).logits - want["logits"]).abs().max() < 1e-4
model.train()
loss = model(want["ids"], labels=want["ids"]).loss
loss.backward()
assert all(p.grad is not None for n, p in model.named_parameters() if "gate.encoder" in n)
model.save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True).eval()
with torch.no_grad():
    assert (again(want["ids"]).logits - want["logits"]).abs().max() < 1e-4
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_form_is_stock_where_a_class_does_it(exported: Exported, tmp_path: Path) -> None:
    router = RouterOptions("softmax_topk", {"top_k": 2})
    built, folder, report = exported(replace(MODEL), router, "auto")
    assert not list(folder.glob("*.py")) and "Qwen3MoeForCausalLM" in report.summary
    ids_BS = torch.randint(1, VOCAB, (2, 9))
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert (stock(ids_BS).logits - forward(built, ids_BS)).abs().max() < 1e-4
    card = (folder / "README.md").read_text()
    assert "trust_remote_code" not in card and "`Qwen3MoeForCausalLM`, which transformers ships" in card


def test_a_biased_gate_is_refused_by_stock_classes(exported: Exported) -> None:
    """pitfalls row 13 (FlagScale PR412, ms-swift#6793): no place for the bias is an error, or another form."""
    with pytest.raises(ValueError, match="selection bias, for which qwen3_moe has no place"):
        exported(MODEL, ROUTERS["softmax_topk"], "stock")


def test_the_card_has_what_the_run_measured(exported: Exported, tmp_path: Path) -> None:
    result = {"step": 7, "data": "held out", "loss": 3.25, "perplexity": 25.79, "layers": []}
    result["mean"] = {"gini": 0.125, "mean_k": 2.0}
    write_evaluation(tmp_path / "run/evaluation/other.json", result | {"step": 6, "loss": 9.0})
    write_evaluation(tmp_path / "run/evaluation/held_out.json", result)
    _, folder, report = exported(MODEL, ROUTERS["lpr"], "auto")
    card = (folder / "README.md").read_text()
    for part in ("On `held out`, step 7", "| 3.2500 |", "| 25.79 |", "gini, mean over layers | 0.125 |", "gate `lpr`"):
        assert part in card
    assert "router.gate is lpr, while qwen3_moe routes by softmax_topk" in card
    assert any("trust_remote_code=True" in note for note in report.notes)


@pytest.mark.parametrize("gate", available_gates())
def test_a_bundle_stands_alone(gate: str) -> None:
    source = bundle(gate)
    assert "moe_train." not in "\n".join(line for line in source.splitlines() if "import" in line)
    module: dict[str, Any] = {"__name__": "bundled"}
    sys.modules["bundled"] = type(sys)("bundled")
    try:
        sys.modules["bundled"].__dict__.update(module)
        exec(compile(source, "bundled", "exec"), sys.modules["bundled"].__dict__)
        built = sys.modules["bundled"].build_gate(gate, ROUTERS[gate].options, 16, 8)
        assert type(built).__module__ == "bundled"
    finally:
        del sys.modules["bundled"]


def test_a_gate_of_another_project_is_named() -> None:
    class Elsewhere(Gate):
        pass

    register_gate("elsewhere", object)(Elsewhere)
    try:
        with pytest.raises(ValueError, match="gate 'elsewhere' is defined in .*outside of moe_train.routing"):
            bundle("elsewhere")
    finally:
        del _GATES["elsewhere"]
