"""A trained model in Python: load, logits, text, routing; in one process, without a launcher.

    from moe_train.api import load

    model = load("runs/demo")
    print(model.generate("The law", max_new_tokens=40)[0].text)

Suffixes: B sequences, S tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe_train.data.tokenizers import Tokenizer
    from moe_train.evaluation.generation.completion import Completion
    from moe_train.evaluation.generation.loop import TextGenerator
    from moe_train.evaluation.trace import Trace
    from moe_train.model.language_model import LanguageModel
    from moe_train.parallel.groups import Groups
    from moe_train.training.run_config import RunConfig

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""One text, texts, the token ids of one sequence or of each one; tensors and arrays of ids too."""


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    step: int | None = None,
    tokenizer: str | Path | None = None,
) -> LoadedModel:
    """The model of a run folder (of an imported model also), or of a checkpoint inside of one.

    device: such as "cpu" or "cuda:0"; None takes an accelerator where there is one.   dtype: float32 or bfloat16 (a
    name or torch's type); None for that of the training.   step: the checkpoint of this step in place of the latest.
    tokenizer: a file or folder in place of the run's own.
    Any number of models can be loaded. The first call starts torch.distributed for this process alone, unless it runs.
    Errors: FileNotFoundError, ValueError where there is no such checkpoint, or in one of several processes that work
    together (for these: ``moe-train generate --processes N``).
    """
    import torch

    from moe_train.parallel.device import local_device
    from moe_train.parallel.groups import single_process
    from moe_train.training.loading import load_model, run_and_checkpoint, with_layout_for
    from moe_train.training.run_folder import load as load_config

    run_dir, checkpoint = run_and_checkpoint(Path(path), step)
    config = with_layout_for(load_config(run_dir), 1)
    groups = single_process(torch.device(device) if device is not None else local_device())
    weights = load_model(config, groups, checkpoint, None if dtype is None else str(dtype).removeprefix("torch."))
    return LoadedModel(
        model=weights.model,
        config=config,
        step=int(weights.state["step"]),
        run_dir=run_dir,
        groups=groups,
        tokenizer_path=None if tokenizer is None else Path(tokenizer),
    )


@dataclass
class LoadedModel:
    model: LanguageModel
    """torch module in evaluation mode."""
    config: RunConfig
    """Configuration of its run."""
    step: int
    """Optimizer steps that its training had taken."""
    run_dir: Path
    groups: Groups
    tokenizer_path: Path | None = None

    @property
    def device(self) -> torch.device:
        return self.groups.device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer, or the one given to ``load``. ValueError where none is found."""
        from moe_train.training.run_tokenizer import run_tokenizer

        return run_tokenizer(self.run_dir, self.config, self.tokenizer_path)

    def encode(self, prompts: Prompts) -> list[list[int]]:
        """Ids of each prompt; ids stay as they are. ValueError for what is neither text nor ids."""
        from moe_train.evaluation.token_ids import id_lists, plain
        from moe_train.training.run_tokenizer import encode_prompts

        given: Any = [prompts] if isinstance(prompts, str) else plain(prompts)
        if not hasattr(given, "__iter__"):
            raise ValueError(f"prompts are {given!r}; give a text, texts, or lists of token ids")
        given = list(given)
        texts = [prompt for prompt in given if isinstance(prompt, str)]
        if not texts:
            return id_lists(given)
        if len(texts) < len(given):
            raise ValueError("give all prompts as texts or all as token ids")
        return encode_prompts(self.tokenizer, self.run_dir, texts)

    def logits(self, ids_BS: Sequence[Sequence[int]] | Sequence[int] | Tensor) -> Tensor:
        """Of the token behind each one, [B, S, V] on the model's device; all sequences have S ids. ValueError where
        they do not, and for ids that the model does not know."""
        import torch

        from moe_train.evaluation.token_ids import check_ids, id_lists
        from moe_train.evaluation.trace import read

        sequences = id_lists(ids_BS, "sequence")
        if not sequences:
            raise ValueError("give at least one sequence of token ids")
        check_ids(sequences, self.config.model.vocab_size, "sequence")
        lengths = sorted(len(sequence) for sequence in sequences)
        if lengths[0] < lengths[-1]:
            raise ValueError(f"there are sequences of {lengths[0]} to {lengths[-1]} ids; all must have as many")
        return read(self.model, torch.tensor(sequences, device=self.device))[0]

    def generate(self, prompts: Prompts, **options: Any) -> list[Completion]:
        """The completion of each prompt, in order. Options: those of `GenerationOptions` (max_new_tokens, temperature,
        top_k, top_p, seed, stop, batch_size, use_cache). ValueError for a model that cannot generate token by token."""
        from moe_train.evaluation.generation.completion import complete

        return complete(self.generator, self.encode(prompts), _options(options))

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[str]:
        """The completion of one prompt in pieces of text as they become certain; options as for ``generate``."""
        from moe_train.evaluation.token_ids import plain

        single: Any = plain(prompt)
        ids = () if isinstance(single, str) else single
        # A first element with elements of its own is a prompt by itself.
        if not hasattr(ids, "__iter__") or any(hasattr(plain(token), "__iter__") for token in list(ids)[:1]):
            raise ValueError("stream continues one prompt: give one text or one list of token ids")
        steps = self.generator.steps(self.encode([single]), _options(options))
        return (step.text for step in steps)

    def trace(self, prompts: Prompts) -> list[Trace]:
        """Routing of every token in every layer with experts: experts, combine weights, logits; one trace per text."""
        from moe_train.evaluation.trace import trace

        return trace(self.model, self.encode(prompts), self.device)

    @cached_property
    def generator(self) -> TextGenerator:
        """What continues prompts. Where no tokenizer is found it can still continue ids: their completions have no text
        then, and end nowhere but at their full length."""
        from moe_train.evaluation.generation.loop import TextGenerator
        from moe_train.evaluation.generation.text import Vocabulary
        from moe_train.training.run_tokenizer import NoTokenizer, end_ids

        try:
            vocabulary = Vocabulary(self.tokenizer.bytes_V, end_ids(self.tokenizer, self.run_dir))
        except NoTokenizer:
            vocabulary = Vocabulary()
        return TextGenerator(self.model, self.groups, vocabulary, self.config.data.sequence_length)


def _options(options: dict[str, Any]) -> Any:
    from moe_train.evaluation.generation.options import GenerationOptions

    stop = options.get("stop")
    if stop is None:
        stop = ()
    elif isinstance(stop, str) or not hasattr(stop, "__iter__"):
        stop = (stop,)
    return GenerationOptions(**options | {"stop": tuple(stop)})
