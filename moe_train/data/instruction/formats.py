"""Where the columns of a row hold a conversation: lists of messages, pairs of columns, and published sets.

Sources of the column names: the data sets' pages on the Hugging Face hub, as named below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_train.data.instruction.conversation import Message, Unusable, conversation


@dataclass(frozen=True)
class MessagesFormat:
    """A column with a list of {role, content} objects."""

    messages: str

    @property
    def columns(self) -> list[str]:
        return [self.messages]

    def read(self, row: Mapping[str, Any]) -> list[Message]:
        messages = row[self.messages]
        if messages is None:
            raise Unusable("no messages")
        if not isinstance(messages, list):
            raise Unusable("no list of messages")
        return conversation(messages)


@dataclass(frozen=True)
class PairFormat:
    """A column with the question and one with the answer."""

    question: str
    answer: str

    @property
    def columns(self) -> list[str]:
        return [self.question, self.answer]

    def read(self, row: Mapping[str, Any]) -> list[Message]:
        return conversation(
            [{"role": "user", "content": row[self.question]}, {"role": "assistant", "content": row[self.answer]}]
        )


@dataclass(frozen=True)
class ChoiceFormat:
    """A question with lettered options; the answer is the letter of one.

    The options are {label: [...], text: [...]}, or a list of {label, text}.
    """

    question: str
    options: str
    answer: str

    @property
    def columns(self) -> list[str]:
        return [self.question, self.options, self.answer]

    def read(self, row: Mapping[str, Any]) -> list[Message]:
        options = _options(row[self.options])
        question, answer = row[self.question], row[self.answer]
        if not isinstance(question, str) or not question.strip():
            raise Unusable("no question")
        if not isinstance(answer, str) or not answer:  # test sets are published without answers
            raise Unusable("no answer")
        if answer not in options:
            raise Unusable("the answer is none of the options")
        listed = "".join(f"{label}. {text}\n" for label, text in options.items())
        prompt = f"{question}\n{listed}Answer:"
        return conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])


def _options(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        labels, texts = value.get("label"), value.get("text")
    elif isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        labels, texts = [one.get("label") for one in value], [one.get("text") for one in value]
    else:
        raise Unusable("no options")
    if not isinstance(labels, list) or not isinstance(texts, list) or not labels or len(labels) != len(texts):
        raise Unusable("no options")
    if not all(isinstance(one, str) for one in (*labels, *texts)):
        raise Unusable("no options")
    return dict(zip(labels, texts, strict=True))


Format = MessagesFormat | PairFormat | ChoiceFormat

PUBLISHED: dict[str, Format] = {
    # meta-math/MetaMathQA
    "metamathqa": PairFormat("query", "response"),
    # ise-uiuc/Magicoder-Evol-Instruct-110K
    "magicoder-evol-instruct": PairFormat("instruction", "response"),
    # allenai/openbookqa, configuration main
    "openbookqa": ChoiceFormat("question_stem", "choices", "answerKey"),
    # tau/commonsense_qa
    "commonsenseqa": ChoiceFormat("question", "choices", "answerKey"),
    # FreedomIntelligence/medical-o1-reasoning-SFT; its column Complex_CoT is left out
    "medical-o1": PairFormat("Question", "Response"),
}
FORMATS = ("messages", "prompt-response", *PUBLISHED)
