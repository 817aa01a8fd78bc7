"""What a run may change of the model whose weights it begins with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moe_train.model.options import InitOptions, LatentAttentionOptions, ModelOptions, MoEOptions, RopeScaling
from moe_train.routing.options import BalancingOptions, RouterOptions
from moe_train.training.initial import check_function
from moe_train.training.options import TrainOptions
from moe_train.training.run_config import RunConfig, to_dict

MODEL = ModelOptions(rope_theta=1e6, hidden_size=64, num_attention_heads=4)
RUN = RunConfig(model=MODEL, router=RouterOptions("softmax_topk", {"top_k": 2}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 500.0}, "model.rope_theta: 1000000.0 there, 500.0 now"),
        ({"norm_eps": 0.1}, "model.norm_eps: 1e-06 there, 0.1 now"),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, "model.rope_scaling: null there, {'kind': 'linear'"),
        ({"clip_qkv": 8.0, "family": "olmoe"}, "model.clip_qkv: null there, 8.0 now"),
        ({"family": "mixtral"}, "model.family: qwen3_moe there, mixtral now"),
        ({"num_attention_heads": 8, "head_dim": 8}, "model.head_dim: 16 there, 8 now"),
        ({"num_key_value_heads": 4}, "model.num_key_value_heads: 2 there, 4 now"),
        ({"latent_attention": LatentAttentionOptions()}, "model.latent_attention: null there"),
    ],
)
def test_what_changes_the_function_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="Take these values from the config.yaml") as caught:
        check_function(to_dict(RUN), replace(RUN, model=replace(MODEL, **changes)), "models/a")
    assert "models/a" in str(caught.value) and message in str(caught.value)


def test_rotary_positions_may_change_where_that_is_asked_for() -> None:
    """To go on with longer texts."""
    longer = replace(MODEL, rope_theta=5e6, rope_scaling=RopeScaling("yarn", 4.0, 4096))
    changed = replace(RUN, model=longer, train=TrainOptions(init_may_change=["rope_theta"]))
    with pytest.raises(ValueError, match=r"train.init_may_change=\[rope_theta,rope_scaling\]") as caught:
        check_function(to_dict(RUN), changed, "models/a")
    assert "model.rope_scaling: null there" in str(caught.value) and "model.rope_theta" not in str(caught.value)
    changed = replace(changed, train=TrainOptions(init_may_change=["rope_theta", "rope_scaling"]))
    note = check_function(to_dict(RUN), changed, "models/a")
    assert note is not None and "as asked: model.rope_theta: 1000000.0 there, 5000000.0 now; model.rope_scaling" in note
    note = check_function(
        to_dict(RUN), replace(changed, router=RouterOptions("softmax_topk", {"top_k": 4})), "models/a"
    )
    assert note is not None and len(note.splitlines()) == 2
    dense = replace(changed, model=replace(longer, family="qwen3", ffn_hidden_size=8))
    before = replace(RUN, model=replace(MODEL, family="qwen3", ffn_hidden_size=8))
    assert "as asked" in (check_function(to_dict(before), dense, "models/a") or "")
    assert check_function(to_dict(changed), changed, "models/a") is None


def test_every_difference_is_listed() -> None:
    changed = replace(RUN, model=replace(MODEL, rope_theta=500.0, norm_eps=0.1))
    with pytest.raises(ValueError, match=r"(?s)model\.rope_theta.*model\.norm_eps"):
        check_function(to_dict(RUN), changed, "models/a")


def test_other_choices_of_experts_are_noted() -> None:
    changed = replace(RUN, router=RouterOptions("softmax_topk", {"top_k": 4}))
    note = check_function(to_dict(RUN), changed, "models/a")
    assert note is not None and "router.options.top_k 2 there, 4 now" in note and "renormalize" not in note
    note = check_function(to_dict(RUN), replace(RUN, router=RouterOptions("sigmoid_topk", {"top_k": 2})), "a")
    assert note is not None and "router.gate softmax_topk there, sigmoid_topk now" in note
    dense = replace(changed, model=replace(MODEL, family="qwen3", ffn_hidden_size=8))
    assert check_function(to_dict(dense), replace(dense, router=RUN.router), "a") is None


@pytest.mark.parametrize(
    "changed",
    [
        replace(RUN, model=replace(MODEL, head_dim=16)),
        replace(RUN, model=replace(MODEL, init=InitOptions(std=1.0), loss_chunk_tokens=7, vocab_multiple=8)),
        replace(RUN, model=replace(MODEL, moe=MoEOptions(experts="reference"))),
        replace(
            RUN, router=RouterOptions("softmax_topk", {"top_k": 2, "renormalize": True}, BalancingOptions(z_loss=1))
        ),
    ],
)
def test_what_does_not_matter(changed: RunConfig) -> None:
    assert check_function(to_dict(RUN), changed, "models/a") is None


def test_what_an_older_version_did_not_record_has_its_default() -> None:
    recorded = to_dict(RUN)
    for key in ("clip_qkv", "latent_attention", "rope_scaling"):
        del recorded["model"][key]
    assert check_function(recorded, RUN, "models/a") is None
