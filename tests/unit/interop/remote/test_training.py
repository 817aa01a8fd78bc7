"""What fine-tuning by transformers asks of a model with a modelling file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moe_train.routing import available_gates
from moe_train.routing.options import RouterOptions
from moe_train.training.convert import export_model
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


@pytest.fixture
def models(tmp_path: Path) -> list[Any]:
    """One model in a class of transformers, and with the modelling file."""
    router = RouterOptions("softmax_topk", {"top_k": 2})
    run = saved(tmp_path / "run", random_model(MODEL, router), MODEL, router)
    for form in ("stock", "custom"):
        export_model(run, tmp_path / form, form=form, shard_bytes=10**9)
    return [load(tmp_path / form) for form in ("stock", "custom")]


@pytest.mark.parametrize("count", [None, 30, torch.tensor(30)])
def test_the_loss_of_accumulated_gradients(models: list[Any], count: Any) -> None:
    """The Trainer does not divide by the number of micro-batches where forward takes any argument: the model must
    divide by the number of labels in all of them."""
    ids_BS = torch.randint(1, VOCAB, (2, 9))
    labels_BS = ids_BS.clone()
    labels_BS[0, :5] = -100
    want, got = (model(ids_BS, labels=labels_BS, num_items_in_batch=count).loss for model in models)
    assert (want - got).abs() < 1e-4 * want.abs()


@pytest.mark.parametrize(("gate", "reentrant"), [*((gate, False) for gate in available_gates()), ("lpr", True)])
def test_gradient_checkpointing(exported: Exported, gate: str, reentrant: bool) -> None:
    family = "deepseek_v3" if gate == "sigmoid_topk" else "qwen3_moe"
    _, folder, _ = exported(FAMILIES[family], ROUTERS[gate])
    model = load(folder).train()
    model.enable_input_require_grads()
    ids_BS = torch.randint(1, VOCAB, (2, 9))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[1, :3] = 0
    gradients, calls = [], []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(0))
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        result = model(ids_BS, attention_mask=mask_BS, labels=ids_BS)
        assert (result.past_key_values is None) == enable
        result.loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    assert len(calls) == 3
    for name, want in gradients[0].items():
        got = gradients[1][name]
        assert (want is None) == (got is None), name
        assert want is None or torch.equal(want, got), name
    with pytest.raises(ValueError, match="leave past_key_values out"):
        model(ids_BS, past_key_values=transformers.DynamicCache())
    assert model.eval()(ids_BS).past_key_values.get_seq_length() == 9


@pytest.mark.parametrize("tied", ["qwen3_moe", "mixtral"])
def test_new_tokens_outlive_saving(exported: Exported, tmp_path: Path, tied: str) -> None:
    _, folder, _ = exported(FAMILIES[tied], ROUTERS["lpr"])
    model = load(folder)
    model.resize_token_embeddings(VOCAB + 3)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    ids_BS = torch.randint(VOCAB + 3, (2, 9))
    want, got = model(ids_BS).logits, again(ids_BS).logits
    assert got.shape == (2, 9, VOCAB + 3) and (want - got).abs().max() < 1e-5


def test_what_it_cannot_do_is_said(models: list[Any]) -> None:
    model = models[1]
    ids_BS = torch.randint(1, VOCAB, (2, 9))
    with pytest.raises(ValueError, match="keeps no attention weights"):
        model(ids_BS, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask has 4 columns for 9 tokens"):
        model(ids_BS, attention_mask=torch.ones(2, 4))


def test_packed_texts_are_refused(models: list[Any]) -> None:
    """transformers' classes take position ids that begin anew for texts that do not see each other."""
    stock, ours = models
    ids_BS = torch.randint(1, VOCAB, (1, 9))
    packed_BS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    alone = ours(ids_BS[:, 4:]).logits
    assert (stock(ids_BS, position_ids=packed_BS, use_cache=False).logits[:, 4:] - alone).abs().max() < 1e-4
    with pytest.raises(ValueError, match="each text a row of its own"):
        ours(ids_BS, position_ids=packed_BS)
    later_BS = torch.arange(5, 14)[None]
    want, got = (model(ids_BS, position_ids=later_BS).logits for model in models)
    assert (want - got).abs().max() < 1e-4


def test_router_logits_by_configuration(models: list[Any]) -> None:
    ids_BS = torch.randint(1, VOCAB, (2, 9))
    model = models[1]
    assert model(ids_BS).router_logits is None
    model.config.output_router_logits = True
    assert len(model(ids_BS).router_logits) == MODEL.num_layers
    assert model(ids_BS, output_router_logits=False).router_logits is None
