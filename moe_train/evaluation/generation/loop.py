"""The loop: all ranks step together until the last sequence of all of them has ended.

Suffixes: B sequences of a batch, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from moe_train.evaluation.generation.context import CachedContext, Context, WholeContext
from moe_train.evaluation.generation.length_warning import BeyondTraining
from moe_train.evaluation.generation.options import GenerationOptions
from moe_train.evaluation.generation.random_numbers import RandomNumbers, numbers_of
from moe_train.evaluation.generation.sampling import choose
from moe_train.evaluation.generation.spread import batches_of_rank, go_on
from moe_train.evaluation.generation.support import check_generates
from moe_train.evaluation.generation.text import TextStream, Vocabulary
from moe_train.evaluation.token_ids import check_ids
from moe_train.parallel.groups import Groups

Finish = Literal["end", "stop", "length"]
"""A token that ends documents, a stop string, or as many tokens as were asked for."""


Steps: TypeAlias = "Generator[Step, None, None]"


@dataclass(frozen=True)
class Step:
    """One new token of one sequence."""

    prompt: int
    """Number of the prompt, from 0."""
    token: int
    text: str
    """What has become certain with it; the pieces of a sequence together are its text."""
    finish: Finish | None = None
    """Why this is its last token."""


@dataclass
class _Sequence:
    number: int
    prompt: Sequence[int]
    random: RandomNumbers
    text: TextStream
    count: int = 0
    finish: Finish | None = None

    def take(self, token: int, vocabulary: Vocabulary, limit: int) -> Step:
        self.count += 1
        ended = token in vocabulary.end_ids
        text = "" if ended else self.text.add(token)
        if ended:
            self.finish = "end"
        elif self.text.stopped:
            self.finish = "stop"
        elif self.count == limit:
            self.finish = "length"
        if self.finish is not None:
            text += self.text.end()
        return Step(self.number, token, text, self.finish)


class TextGenerator:
    """Continues prompts with a model in evaluation mode, on each rank those that fall to it.

    trained_length: tokens of the texts that the model was trained on; longer ones are allowed, as positions are rotary,
    with one warning on rank 0, whichever rank has such a text.
    Errors: ValueError where the model cannot generate token by token.
    """

    def __init__(
        self, model: Any, groups: Groups, vocabulary: Vocabulary | None = None, trained_length: int | None = None
    ) -> None:
        check_generates(model)
        self.model, self.groups, self.vocabulary = model, groups, vocabulary or Vocabulary()
        self._warn_beyond = trained_length

    def steps(self, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> Steps:
        """The new tokens of this rank's prompts (ids, at least one each) as they come.

        Collective: every rank must bring the same arguments and go on to the end. What a rank's own code raises between
        two tokens ends the others as well, with a RuntimeError. Errors: ValueError for a prompt without tokens or with
        one that the model does not know, and for stop strings without a vocabulary; FloatingPointError where logits are
        not finite.
        """
        self._check(prompts, options)
        random = numbers_of(options.seed, prompts)
        for numbers in batches_of_rank(len(prompts), options.batch_size, self.groups):
            text = [TextStream(self.vocabulary, options.stop) for _ in numbers]
            made = [_Sequence(n, prompts[n], random[n], t) for n, t in zip(numbers, text, strict=True)]
            yield from self._batch(made, options)

    def _check(self, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> None:
        if options.stop and not self.vocabulary.bytes_V:
            raise ValueError("stop strings need a tokenizer")
        check_ids(prompts, self.model.output_layer.vocab_size)

    def _batch(self, sequences: list[_Sequence], options: GenerationOptions) -> Steps:
        context = self._context(sequences, options)
        problem: BaseException | None = None
        while self._go_on(sequences, problem):
            logits_BV = context.logits()
            try:
                tokens = self._next(logits_BV, sequences, options)
                going = [(s, token) for s, token in zip(sequences, tokens, strict=True) if token is not None]
                for sequence, token in going:
                    yield sequence.take(token, self.vocabulary, options.max_new_tokens)
                context.append([t if s.finish is None else None for s, t in zip(sequences, tokens, strict=True)])
            except BaseException as error:  # also a consumer that has gone: the other ranks wait for an answer
                problem = error

    def _go_on(self, sequences: list[_Sequence], problem: BaseException | None) -> bool:
        """Whether any rank has a sequence that goes on; every rank hears of a problem, rank 0 warns of a long text."""
        limit = self._warn_beyond
        beyond = limit is not None and any(len(s.prompt) + s.count > limit for s in sequences)
        active, beyond = go_on(self.groups, any(s.finish is None for s in sequences), beyond, problem)
        if beyond:
            self._warn_beyond = None
            if self.groups.rank == 0:
                message = f"a text is longer than the {limit} tokens that the model was trained on; it may become worse"
                warnings.warn(message, BeyondTraining, stacklevel=2)
        return active

    def _context(self, sequences: list[_Sequence], options: GenerationOptions) -> Context:
        prompts, numbers = [s.prompt for s in sequences], [s.number for s in sequences]
        if not options.use_cache:
            return WholeContext(self.model, prompts, numbers)
        longest = max((len(prompt) for prompt in prompts), default=1)
        return CachedContext(self.model, prompts, numbers, longest + options.max_new_tokens)

    def _next(self, logits_BV: Tensor, sequences: list[_Sequence], options: GenerationOptions) -> list[int | None]:
        """None for a sequence that has ended."""
        if not sequences:
            return []
        bad = ~torch.isfinite(logits_BV).all(-1)
        uniform_B = torch.tensor([s.random.at(s.count) for s in sequences], dtype=torch.float64).to(logits_BV.device)
        tokens = torch.where(bad, -1, choose(logits_BV, uniform_B, options)).tolist()
        for sequence, token in zip(sequences, tokens, strict=True):
            if sequence.finish is None and token < 0:
                raise FloatingPointError(f"the logits behind prompt {sequence.number} are not finite")
        return [None if s.finish is not None else token for s, token in zip(sequences, tokens, strict=True)]
