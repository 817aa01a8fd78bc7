from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_train.data.instruction import InstructionEncoder, InstructionOptions
from moe_train.data.instruction.conversation import Message, Unusable
from moe_train.data.instruction.formats import FORMATS, PUBLISHED, ChoiceFormat, MessagesFormat, PairFormat
from moe_train.data.tokenizers import SentencePieceTokenizer

ROWS: dict[str, dict[str, Any]] = {
    "metamathqa": {"query": "What is 2 + 3?", "response": "It is 5. The answer is: 5", "type": "made up"},
    "magicoder-evol-instruct": {"instruction": "Write a loop.", "response": "for i in range(3): pass"},
    "openbookqa": {
        "id": "7-1",
        "question_stem": "A plant needs",
        "choices": {"text": ["stone", "light", "glass", "salt"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    "commonsenseqa": {
        "id": "x",
        "question": "Where do books stand?",
        "question_concept": "book",
        "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["shelf", "sea", "sky", "oven", "shoe"]},
        "answerKey": "A",
    },
    "medical-o1": {"Question": "Is it a cold?", "Complex_CoT": "Let me see.", "Response": "Probably."},
}


def test_every_published_set_is_tried() -> None:
    assert ROWS.keys() == PUBLISHED.keys()
    assert FORMATS == ("messages", "prompt-response", *ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_published_sets_from_parquet(name: str, tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    """Question and answer as they stand in the columns; of options, letters and texts, and the letter as answer."""
    row = ROWS[name]
    pq.write_table(pa.Table.from_pylist([row] * 3), tmp_path / "set.parquet")
    encoder = InstructionEncoder(InstructionOptions(name, "plain"), tokenizer)
    batch = encoder.encode(pq.read_table(tmp_path / "set.parquet", columns=encoder.columns).to_pydict())
    assert len(batch.lengths_D) == 3 and not batch.bad
    text = tokenizer.decode(batch.ids_N[: batch.lengths_D[0]])
    counted = tokenizer.decode(batch.ids_N[batch.loss_mask_N == 1][: int(batch.loss_mask_N.sum()) // 3])
    want = {
        "openbookqa": ("A plant needs\nA. stone\nB. light\nC. glass\nD. salt\nAnswer:", "B"),
        "commonsenseqa": ("Where do books stand?\nA. shelf\nB. sea\nC. sky\nD. oven\nE. shoe\nAnswer:", "A"),
        "medical-o1": ("Is it a cold?", "Probably."),
        "metamathqa": (row.get("query"), row.get("response")),
        "magicoder-evol-instruct": (row.get("instruction"), row.get("response")),
    }[name]
    assert text == f"User:\n{want[0]}\n\nAssistant:\n{want[1]}" and counted == want[1]


def test_messages_from_json() -> None:
    lines = (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "x": 1}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\ud800"}]}',
    )
    found = [reason_or_messages(MessagesFormat("messages"), json.loads(line)) for line in lines]
    assert found == [[Message("user", "a"), Message("assistant", "b")], "invalid UTF-8"]


def reason_or_messages(format: Any, row: dict[str, Any]) -> Any:
    try:
        return format.read(row)
    except Unusable as error:
        return str(error)


def turn(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "no messages"),
        ([], "no messages"),
        ("a: b", "no list of messages"),
        (["a", "b"], "a message is no object with role and content"),
        ([turn("user", "a")], "no answer"),
        ([turn("user", "a"), turn("assistant", " \n")], "no answer"),
        ([turn("user", "a"), turn("assistant", None)], "no answer"),
        ([turn("user", ""), turn("assistant", "b")], "no question"),
        ([turn("user", "a"), turn("tool", "b"), turn("assistant", "c")], "unknown role"),
        ([turn(["user"], "a"), turn("assistant", "c")], "unknown role"),
        ([turn("user", 3), turn("assistant", "c")], "no text"),
        ([turn("system", "a")], "no answer"),
        ([turn("system", None)], "no messages"),
    ],
)
def test_unusable_messages(messages: Any, reason: str) -> None:
    assert reason_or_messages(MessagesFormat("m"), {"m": messages}) == reason


def test_what_is_left_out() -> None:
    messages = [turn("system", ""), turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    assert MessagesFormat("m").read({"m": messages}) == [Message("user", "a"), Message("assistant", "b")]


def test_unusable_pairs_and_choices() -> None:
    pair, choice = PairFormat("q", "a"), ChoiceFormat("q", "o", "a")
    options = {"label": ["A", "B"], "text": ["x", "y"]}
    assert reason_or_messages(pair, {"q": None, "a": "b"}) == "no question"
    assert reason_or_messages(pair, {"q": "a", "a": ""}) == "no answer"
    assert reason_or_messages(choice, {"q": " ", "o": options, "a": "A"}) == "no question"
    for answer in ("", None, 2):
        assert reason_or_messages(choice, {"q": "a", "o": options, "a": answer}) == "no answer"
    assert reason_or_messages(choice, {"q": "a", "o": options, "a": "C"}) == "the answer is none of the options"
    for wrong in (None, {"label": ["A"], "text": []}, {"label": [1], "text": ["x"]}, ["x"], {}):
        assert reason_or_messages(choice, {"q": "a", "o": wrong, "a": "A"}) == "no options"
    as_list = [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]
    assert choice.read({"q": "a", "o": as_list, "a": "B"}) == choice.read({"q": "a", "o": options, "a": "B"})
