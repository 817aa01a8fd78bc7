"""Small tokenizers with the special tokens of the chat templates, and the templates in jinja."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from moe_train.data.tokenizers import Tokenizer, load_tokenizer
from moe_train.data.tokenizers.tiktoken_file import ENCODINGS
from tests.unit.data.test_tokenizers import random_text

SPECIAL = {
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
EOS = {"qwen3": "<|endoftext|>", "llama3": "<|end_of_text|>"}


def save_tokenizer(folder: Path, family: str, eos: str, thoughts: bool = True) -> Path:
    """A byte-level BPE cut as the family's; Qwen's `<think>` is a token, but none that is marked special."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    pattern = tokenizers.Regex(ENCODINGS["qwen" if family == "qwen3" else "llama3"].pattern)
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(pattern, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL[family],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(1)
    engine.train_from_iterator([text(rng) for _ in range(300)] + ["user\nassistant\n\nsystem\n"] * 50, trainer)
    if family == "qwen3" and thoughts:
        engine.add_tokens([tokenizers.AddedToken(mark, special=False) for mark in ("<think>", "</think>")])
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


def text(rng: random.Random) -> str:
    """Not empty, and without white space at its beginning, which a tokenizer may join with a header's line break."""
    words = ["the gate ", "expert\n", "1234 ", "\n\n", "it's ", "  ", "日本 ", "x=1; ", "token\t", "."]
    start = rng.choice(["Why", "é", "3", "(a)"])
    return start + "".join(rng.choice(words) for _ in range(rng.randrange(12))) + random_text(rng).replace("<|", "<")


def dialogue(rng: random.Random, turns: int) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": text(rng)}] if rng.random() < 0.5 else []
    for _ in range(turns):
        messages += [{"role": "user", "content": text(rng)}, {"role": "assistant", "content": text(rng)}]
    return messages


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tokenizer(tmp_path_factory.mktemp(family), family, EOS[family]) for family in SPECIAL}


@pytest.fixture(scope="session")
def tokenizers_of(folders: dict[str, Path]) -> Callable[[str], Tokenizer]:
    loaded = {family: load_tokenizer(folder) for family, folder in folders.items()}
    return lambda family: loaded[family]


@pytest.fixture(scope="session")
def hugging_face(folders: dict[str, Path]) -> Callable[[str], Any]:
    """The same tokenizers in transformers, with the published format as a jinja template."""
    import transformers

    def load(family: str) -> Any:
        return transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folders[family] / "tokenizer.json"), chat_template=JINJA[family]
        )

    return load


JINJA = {
    "qwen3": """
{%- set place = namespace(question=messages|length - 1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set place.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {%- set thoughts = message.reasoning_content or '' -%}
    {%- set answer = message.content -%}
    {%- if not thoughts and '</think>' in answer -%}
      {%- set thoughts = answer.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
      {%- set answer = answer.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if loop.index0 > place.question and (loop.last or thoughts) -%}
      {%- if thoughts -%}
        {%- generation -%}
          {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') + '<|im_end|>' -}}
        {%- endgeneration -%}
      {%- else -%}
        {{- '<think>\\n\\n</think>\\n\\n' -}}
        {%- generation -%}{{- answer.lstrip('\\n') + '<|im_end|>' -}}{%- endgeneration -%}
      {%- endif -%}
    {%- else -%}
      {%- generation -%}{{- answer + '<|im_end|>' -}}{%- endgeneration -%}
    {%- endif -%}
    {{- '\\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
""",
    "llama3": """
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{- message.content|trim + '<|eot_id|>' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message.content|trim + '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
""",
}
