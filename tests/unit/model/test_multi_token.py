"""Which positions predict two tokens ahead. What is trained with them: tests/distributed/test_families.py."""

from __future__ import annotations

import torch

from moe_train.model.multi_token import multi_token_labels, multi_token_targets


def bools(text: str) -> torch.Tensor:
    return torch.tensor([[c == "x" for c in text]])


def test_both_next_tokens_must_be_targets() -> None:
    assert torch.equal(multi_token_targets(bools("xxx.xx.x"), None), bools("xx..x..."))
    assert torch.equal(multi_token_targets(bools("xxxx"), None), bools("xxx."))
    assert not multi_token_targets(bools("x.x."), None).any()
    assert not multi_token_targets(bools("x"), None).any()


def test_both_must_be_in_the_same_text() -> None:
    position_BS = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]])
    assert torch.equal(multi_token_targets(bools("xx..xxx."), position_BS), bools("x...xx.."))
    # Also where a target crosses into the next text, which readers do not make.
    assert torch.equal(multi_token_targets(bools("xxxxxxxx"), position_BS), bools("xx..xxx."))


def test_labels_are_the_tokens_behind_the_next_ones() -> None:
    assert multi_token_labels(torch.tensor([[5, 6, 7], [8, 9, 4]])).tolist() == [[6, 7, 0], [9, 4, 0]]
