"""Generation on every rank of a pool."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import torch.distributed as dist

from moe_train.evaluation.generation.completion import Completion, complete
from moe_train.evaluation.generation.length_warning import plain_warnings
from moe_train.evaluation.generation.loop import Step, TextGenerator
from moe_train.evaluation.generation.options import GenerationOptions
from moe_train.evaluation.generation.text import Vocabulary
from tests.distributed.harness.training import Case, build_model, groups_of

LETTERS = Vocabulary([bytes([byte]) if byte >= 32 else b"" for byte in range(100)], frozenset(range(10, 22)))


class Broken(Exception):
    """What a rank's own code raises."""


def generate(
    case: Case, prompts: Sequence[Sequence[int]], options: GenerationOptions, fail_on: int | None = None
) -> list[Completion]:
    """Completions of a fresh model. ``fail_on``: the rank that raises behind its third token; the others must hear of
    it and raise as well, and all can go on to work together."""

    def fail(step: Step) -> None:
        seen.append(step)
        if dist.get_rank() == fail_on and len(seen) == 3:
            raise Broken("no more")

    seen: list[Step] = []
    groups = groups_of(case)
    generator = TextGenerator(build_model(case).eval(), groups, LETTERS)
    if fail_on is None:
        return complete(generator, prompts, options)
    try:
        complete(generator, prompts, options, fail)
    except Broken:
        assert dist.get_rank() == fail_on
    except RuntimeError as error:
        assert dist.get_rank() != fail_on and "another rank has failed" in str(error)
    else:
        raise AssertionError("nothing was raised")
    dist.barrier()
    return complete(generator, prompts, options)


def warnings_of(case: Case, prompts: Sequence[Sequence[int]], options: GenerationOptions, trained_length: int) -> str:
    """What a rank's stderr says of two generations."""
    generator = TextGenerator(build_model(case).eval(), groups_of(case), LETTERS, trained_length)
    error = io.StringIO()
    with contextlib.redirect_stderr(error), plain_warnings():
        for _ in range(2):
            complete(generator, prompts, options)
    return error.getvalue()


def load_here(path: str) -> str:
    """What the Python API says in a process that works together with others."""
    from moe_train.api import load

    try:
        load(path)
    except ValueError as error:
        return str(error)
    return ""
