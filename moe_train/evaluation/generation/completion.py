"""What a prompt became."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_train.evaluation.generation.loop import Finish, Step, TextGenerator
from moe_train.evaluation.generation.options import GenerationOptions
from moe_train.evaluation.generation.spread import gather


@dataclass
class Completion:
    text: str = ""
    """Without the prompt, without a stop string."""
    ids: list[int] = field(default_factory=list)
    """Every token that was generated, also one that ends documents and those of a stop string."""
    finish: Finish | None = None
    """Why it ended: "end" (of the document), "stop" (string) or "length" (max_new_tokens)."""
    prompt_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def complete(
    generator: TextGenerator,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    on_step: Callable[[Step], None] | None = None,
) -> list[Completion]:
    """The completion of each prompt, in order, on every rank; collective. ``on_step`` sees this rank's tokens as they
    come."""
    steps = generator.steps(prompts, options)
    made: dict[int, Completion] = {}
    for step in steps:
        if step.prompt not in made:
            made[step.prompt] = Completion(prompt_tokens=len(prompts[step.prompt]))
        completion = made[step.prompt]
        completion.text += step.text
        completion.ids.append(step.token)
        completion.finish = step.finish
        if on_step is not None:
            try:
                on_step(step)
            except BaseException as error:
                steps.throw(error)  # through the loop, which tells the other ranks
                raise
    return gather(made, generator.groups)
