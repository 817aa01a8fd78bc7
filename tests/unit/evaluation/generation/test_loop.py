"""The loop in one process: what it draws, where it ends, what it says."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch

from moe_train.evaluation.generation.completion import Completion, complete
from moe_train.evaluation.generation.length_warning import BeyondTraining
from moe_train.evaluation.generation.loop import Step, TextGenerator
from moe_train.evaluation.generation.options import GenerationOptions
from moe_train.evaluation.generation.text import Vocabulary
from moe_train.model.language_model import LanguageModel
from moe_train.parallel.groups import Groups
from tests.unit.evaluation.generation.conftest import BASE, build

LETTERS = Vocabulary([bytes([byte]) if byte >= 32 else b"" for byte in range(100)], frozenset({1}))
PROMPTS = [[5, 6, 7], [40], [9, 9, 9, 9, 9, 9], [5, 6, 7], [80, 2]]
DRAWN = GenerationOptions(max_new_tokens=10, temperature=1.0, top_k=30, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def model(groups: Groups) -> LanguageModel:
    return build(BASE)


def run(
    model: LanguageModel, groups: Groups, prompts: Sequence[Sequence[int]] = PROMPTS, **changes: object
) -> list[Completion]:
    options = GenerationOptions(**{**vars(DRAWN), **changes})  # type: ignore[arg-type]
    return complete(TextGenerator(model, groups, LETTERS), prompts, options)


def test_completions(model: LanguageModel, groups: Groups) -> None:
    found = run(model, groups)
    assert [c.prompt_tokens for c in found] == [3, 1, 6, 3, 2]
    for c in found:
        kept = c.ids[:-1] if c.finish == "end" else c.ids
        assert c.text == "".join(chr(token) if token >= 32 else "" for token in kept)
        assert (c.finish == "end") == (c.ids[-1] == 1) and 1 not in kept
        assert c.finish == "end" or len(c.ids) == 10
    assert found[0].ids != found[3].ids, "equal prompts are drawn for anew"
    assert found == run(model, groups)
    assert found != run(model, groups, seed=4)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_neither_batches_nor_order_nor_the_cache_matter(
    model: LanguageModel, groups: Groups, batch_size: int, use_cache: bool
) -> None:
    want = run(model, groups)
    assert run(model, groups, batch_size=batch_size, use_cache=use_cache) == want
    # The two equal prompts keep their order.
    order = [4, 0, 2, 3, 1]
    assert run(model, groups, [PROMPTS[i] for i in order], batch_size=batch_size) == [want[i] for i in order]
    assert run(model, groups, PROMPTS[2:3], use_cache=use_cache) == [want[2]]


def test_greedy_is_the_largest_logit(model: LanguageModel, groups: Groups) -> None:
    from moe_train.evaluation.trace import read

    [found] = run(model, groups, [[8, 3]], temperature=0.0, top_k=None, top_p=None)
    ids = [8, 3]
    for token in found.ids:
        logits, _ = read(model, torch.tensor([ids]))
        assert token == int(logits[0, -1].argmax())
        ids.append(token)


def test_ends(model: LanguageModel, groups: Groups) -> None:
    [free] = run(model, groups, [[50, 60]], max_new_tokens=30, temperature=3.0, top_k=None, top_p=None)
    assert len(free.text) > 12
    stop = free.text[6:8]
    at = free.text.index(stop)
    [cut] = run(
        model, groups, [[50, 60]], max_new_tokens=30, temperature=3.0, top_k=None, top_p=None, stop=("never", stop)
    )
    assert (cut.text, cut.finish) == (free.text[:at], "stop")
    assert cut.ids == free.ids[: len(cut.ids)] and len(cut.ids) < len(free.ids)
    # A document ends where an id says so, which has no text.
    ending = TextGenerator(model, groups, Vocabulary(LETTERS.bytes_V, frozenset({free.ids[4]})))
    options = GenerationOptions(max_new_tokens=30, temperature=3.0, seed=3)
    [ended] = complete(ending, [[50, 60]], options)
    assert ended.finish == "end" and ended.ids == free.ids[: free.ids.index(free.ids[4]) + 1]


def test_steps_come_one_by_one(model: LanguageModel, groups: Groups) -> None:
    steps: list[Step] = []
    found = complete(TextGenerator(model, groups, LETTERS), PROMPTS, DRAWN, steps.append)
    for number, completion in enumerate(found):
        own = [step for step in steps if step.prompt == number]
        assert [step.token for step in own] == completion.ids
        assert "".join(step.text for step in own) == completion.text
        assert [step.finish for step in own] == [None] * (len(own) - 1) + [completion.finish]
    first = next(TextGenerator(model, groups, LETTERS).steps(PROMPTS, DRAWN))
    assert first == steps[0]


def test_longer_than_the_training_is_said_once(model: LanguageModel, groups: Groups) -> None:
    generator = TextGenerator(model, groups, LETTERS, trained_length=8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        complete(generator, [[3, 3, 3]], GenerationOptions(max_new_tokens=5))
        assert not [warning for warning in said if warning.category is BeyondTraining]
        for _ in range(2):
            complete(generator, [[3, 3, 3], [4, 4]], GenerationOptions(max_new_tokens=9))
    [warning] = [warning for warning in said if warning.category is BeyondTraining]
    assert "longer than the 8 tokens" in str(warning.message)


def test_bad_prompts(model: LanguageModel, groups: Groups) -> None:
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        run(model, groups, [[1], []])
    for token in (-1, 100, 127):
        with pytest.raises(ValueError, match="prompt 0 holds an id outside of the model's vocabulary of 100"):
            run(model, groups, [[1, token]])
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        complete(TextGenerator(model, groups), [[1]], GenerationOptions(stop=("x",)))
    assert run(model, groups, []) == []


def test_logits_that_are_not_finite_are_an_error(groups: Groups) -> None:
    model = build(BASE)
    with torch.no_grad():
        model.output_layer.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="prompt 0 are not finite"):
        run(model, groups)


def test_what_a_consumer_raises_comes_out(model: LanguageModel, groups: Groups) -> None:
    def fail(step: Step) -> None:
        raise OSError("the pipe is closed")

    with pytest.raises(OSError, match="the pipe is closed"):
        complete(TextGenerator(model, groups, LETTERS), PROMPTS, DRAWN, fail)
