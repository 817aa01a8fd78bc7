"""What the classes of transformers can do, models with a modelling file of their own can do as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from moe_train.routing import available_gates, build_gate
from moe_train.routing.options import RouterOptions
from moe_train.training.convert import export_model
from tests.reference import hub
from tests.unit.interop.remote.models import (
    FAMILIES,
    MODEL,
    ROUTERS,
    VOCAB,
    Exported,
    load,
    random_model,
    saved,
)


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
    own = build_gate(gate, ROUTERS[gate].options, config.hidden_size, 8)

    def chosen(name: str, value: torch.Tensor) -> torch.Tensor | None:
        """What the gate itself gives such a tensor at the start."""
        mine = name.rpartition(".mlp.gate.")[2]
        return own.initial(mine, tuple(value.shape), torch.Generator().manual_seed(1)) if mine != name else None

    for name, value in new.named_parameters():
        if (by_gate := chosen(name, value)) is not None:
            assert 0.5 * by_gate.std() <= value.std() <= 2 * by_gate.std(), name
            assert bool(by_gate.std() == 0) == torch.equal(value, different[name]), name
        elif value.dim() == 1:
            assert (value == (0 if name.endswith("bias") else 1)).all(), name
        else:
            assert 0.15 < float(value.std()) < 0.25, name  # model.init.std is 0.2
            assert not torch.equal(value, different[name]), name
    drawn = dict(other.named_buffers())
    for name, value in new.named_buffers():
        if name.endswith("table"):
            assert value.unique().tolist() == list(range(8)) and not torch.equal(value, drawn[name]), name
        else:
            assert not value.any() or chosen(name, value) is not None, name


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
    assert 0.35 < float(prototypes_EL.std()) < 2 and not bias_E.any()
    assert 0.15 < float(experts_EHF.std()) < 0.25
