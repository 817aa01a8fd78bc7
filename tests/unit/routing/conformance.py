"""What the conformance tests share: inputs, and views of a routing."""

from __future__ import annotations

import functools
import inspect

import torch

LENGTHS = [6, 3, 5, 6]
SEQUENCE = 6


def both_modes(test):
    """The test in training and in evaluation mode (its argument ``training``), one after the other: another test for
    each would take longer than most of them do."""

    @functools.wraps(test)
    def run(**arguments):
        for training in (True, False):
            print("in training" if training else "in evaluation")  # shown where it fails
            test(training=training, **arguments)

    signature = inspect.signature(test)
    run.__signature__ = signature.replace(parameters=[p for n, p in signature.parameters.items() if n != "training"])
    return run


def assert_slots_agree(routing):
    """``experts_TK`` holds the kept experts of each row, each once, and E elsewhere."""
    for slots, kept_E in zip(routing.experts_TK.tolist(), routing.kept_TE, strict=True):
        chosen = [e for e in slots if e != kept_E.numel()]
        assert sorted(chosen) == kept_E.nonzero().flatten().tolist()


def outputs(routing):
    """Everything a token's output depends on, [T, ...]."""
    found = {"weights": routing.weights_TE, "selected": routing.selected_TE, "kept": routing.kept_TE}
    if routing.expert_input_shift_TH is not None:
        found["shift"] = routing.expert_input_shift_TH
    return found


def everything(routing):
    found = outputs(routing) | {"logits": routing.logits_TE, "probs": routing.probs_TE} | dict(routing.sums)
    if routing.experts_TK is not None:
        found["experts"] = routing.experts_TK
    return found | {f"loss {n}": t.sum for n, t in routing.losses.items()}


def tokens_of(batch, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    count = batch.padding_T.numel()
    return torch.randn(count, 16, generator=generator, dtype=torch.float64).to(dtype)


def gradients(gate, loss, *inputs):
    """Also of what depends on nothing (a gate without parameters): zeros."""
    wanted = [*gate.parameters(), *inputs]
    if not wanted or not loss.requires_grad:
        assert not list(gate.parameters())
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)


def surrogate(routing):
    """Stands for the language loss: reaches weights and shift."""
    generator = torch.Generator().manual_seed(5)
    loss = (routing.weights_TE * torch.randn(routing.weights_TE.shape, generator=generator)).sum()
    if routing.expert_input_shift_TH is not None:
        noise = torch.randn(routing.expert_input_shift_TH.shape, generator=generator)
        loss = loss + (routing.expert_input_shift_TH * noise).sum()
    return loss
