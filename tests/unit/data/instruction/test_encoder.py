from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.data.instruction import EncodedBatch, InstructionEncoder, InstructionOptions
from moe_train.data.tokenizers import SentencePieceTokenizer, Tokenizer, load_tokenizer, train_sentencepiece
from moe_train.data.tokenizers.gigatoken_engine import GigatokenTokenizer, with_fast_engine
from tests.unit.data.instruction.conftest import dialogue, save_tokenizer, text

Load = Callable[[str], Tokenizer]


def messages_encoder(tokenizer: Tokenizer, template: str, **options: Any) -> InstructionEncoder:
    return InstructionEncoder(InstructionOptions("messages", template, **options), tokenizer)


def documents(batch: EncodedBatch) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each document."""
    ends = np.cumsum(batch.lengths_D)
    assert len(batch.ids_N) == len(batch.loss_mask_N) == ends[-1]
    ids, masks = (np.split(x, ends[:-1]) for x in (batch.ids_N, batch.loss_mask_N))
    return [(one.tolist(), mask.tolist()) for one, mask in zip(ids, masks, strict=True)]


def one(encoder: InstructionEncoder, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    [document] = documents(encoder.encode({"messages": [messages]}))
    return document


@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_ids_and_mask_are_those_of_apply_chat_template(
    tokenizers_of: Load, hugging_face: Callable[[str], Any], family: str
) -> None:
    rng = random.Random(21)
    tokenizer, reference = tokenizers_of(family), hugging_face(family)
    given = [dialogue(rng, rng.randrange(1, 5)) for _ in range(150)]
    encoded = documents(messages_encoder(tokenizer, family).encode({"messages": given}))
    for messages, (ids, mask) in zip(given, encoded, strict=True):
        want = reference.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == [*want["input_ids"], tokenizer.eod_id], messages
        assert mask == [*want["assistant_masks"], 0]
        assert 0 < sum(mask) < len(mask)


def test_thoughts_of_qwen3(tokenizers_of: Load, hugging_face: Callable[[str], Any]) -> None:
    """Given apart or inside the content; counted where there are any; only behind the last question."""
    rng = random.Random(22)
    tokenizer, reference = tokenizers_of("qwen3"), hugging_face("qwen3")
    for _ in range(60):
        messages = dialogue(rng, rng.randrange(1, 4))
        for message in messages:
            if message["role"] == "assistant":
                thoughts, kind = text(rng), rng.randrange(3)
                if kind == 0:
                    message["reasoning_content"] = thoughts
                elif kind == 1:
                    message["content"] = f"<think>\n{thoughts}\n</think>\n\n{message['content']}"
        want = reference.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = one(messages_encoder(tokenizer, "qwen3"), messages)
        assert (ids[:-1], mask[:-1]) == (want["input_ids"], want["assistant_masks"])


@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_an_answer_stands_behind_the_prompt_that_asks_for_it(
    tokenizers_of: Load, hugging_face: Callable[[str], Any], family: str
) -> None:
    """Also where it begins with white space: the model is asked with the prompt's ids and goes on from there."""
    tokenizer, reference = tokenizers_of(family), hugging_face(family)
    for answer in ("  spaces", "\tx", "y \n"):
        question = [{"role": "user", "content": "Why?"}]
        prompt = reference.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        ids, mask = one(messages_encoder(tokenizer, family), [*question, {"role": "assistant", "content": answer}])
        assert ids[: len(prompt)] == prompt and not any(mask[: len(prompt)])
        written = answer.strip() if family == "llama3" else answer
        assert tokenizer.decode(i for i, counts in zip(ids, mask, strict=True) if counts) == written


@pytest.mark.parametrize(("family", "end"), [("qwen3", "<|im_end|>"), ("llama3", "<|eot_id|>")])
def test_the_end_of_the_turn_counts_and_the_last_answer_may_count_alone(
    tokenizers_of: Load, family: str, end: str
) -> None:
    rng = random.Random(23)
    tokenizer = tokenizers_of(family)
    messages = dialogue(rng, 3)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if family == "llama3":
        answers = [answer.strip() for answer in answers]
    counted = {}
    for turns in ("all", "last"):
        ids, mask = one(messages_encoder(tokenizer, family, loss_turns=turns), messages)
        counted[turns] = [i for i, counts in zip(ids, mask, strict=True) if counts]
    end_id = tokenizer.special_tokens[end]
    assert counted["all"].count(end_id) == 3 and counted["all"][-1] == end_id
    assert tokenizer.decode(counted["all"]) == "".join(answers)
    assert counted["last"].count(end_id) == 1 and tokenizer.decode(counted["last"]) == answers[-1]


@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_text_that_spells_special_tokens_is_text(tokenizers_of: Load, family: str) -> None:
    tokenizer = tokenizers_of(family)
    spelled = "a " + "".join(tokenizer.special_tokens) + " b"
    plain, tricky = (
        one(
            messages_encoder(tokenizer, family),
            [{"role": "system", "content": t}, {"role": "user", "content": t}, {"role": "assistant", "content": t}],
        )
        for t in ("a b", spelled)
    )
    special = set(tokenizer.special_tokens.values())
    assert [i for i in plain[0] if i in special] == [i for i in tricky[0] if i in special]
    assert tokenizer.decode(i for i, counts in zip(*tricky, strict=True) if counts) == spelled


def test_plain_needs_no_special_tokens(tokenizer: SentencePieceTokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One <|endoftext|>?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Nobody answers this."},
    ]
    ids, mask = one(messages_encoder(tokenizer, "plain"), messages)
    end = tokenizer.eod_id
    assert tokenizer.decode(ids) == (
        "System:\nBe short.\n\nUser:\nOne <|endoftext|>?\n\nAssistant:\nYes.User:\nAnd?\n\nAssistant:\nNo."
    )
    assert ids.count(end) == 2 and ids[-1] == end and mask[-1] == 1
    counted = [i for i, counts in zip(ids, mask, strict=True) if counts]
    assert tokenizer.decode(counted) == "Yes.No." and counted.count(end) == 2


def test_a_document_is_not_ended_twice(tmp_path: Path) -> None:
    """Where the tokenizer ends documents with the token that ends turns, as Qwen3's."""
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, "qwen3", "<|im_end|>"))
    ids, mask = one(
        messages_encoder(tokenizer, "qwen3"),
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    )
    assert ids.count(tokenizer.eod_id) == 2  # of the question and of the answer
    assert tokenizer.piece(ids[-1]) == "\n" and mask[-2:] == [1, 0]


def test_other_tokenizers_and_the_fast_engine_give_the_same_conversation(
    tokenizers_of: Load, tmp_path: Path, make_texts
) -> None:
    """A sentencepiece model with control symbols; gigatoken in place of the engine that defines the ids."""
    rng = random.Random(25)
    marks = ["<|im_start|>", "<|im_end|>"]
    trained = train_sentencepiece(make_texts(26, 40), tmp_path / "m.model", 330, special_tokens=marks)
    words = ["the gate\n", " expert", "<|im_end|>", "日本 ", "1234"]
    given = [
        [{"role": role, "content": "A" + "".join(rng.choices(words, k=9))} for role in ("user", "assistant") * 2]
        for _ in range(40)
    ]
    decoded = []
    for original in (trained, tokenizers_of("qwen3")):
        said: list[str] = []
        fast = with_fast_engine(original, [message["content"] for message in given[0]], said.append)
        assert isinstance(fast, GigatokenTokenizer), said
        both = [messages_encoder(one, "qwen3").encode({"messages": given}) for one in (original, fast)]
        assert np.array_equal(both[0].ids_N, both[1].ids_N)
        assert np.array_equal(both[0].loss_mask_N, both[1].loss_mask_N)
        decoded.append([original.decode(ids) for ids, _ in documents(both[0])])
        starts = (both[0].ids_N == original.special_tokens[marks[0]]).sum()
        ends = (both[0].ids_N == original.special_tokens[marks[1]]).sum()
        assert starts == ends == 4 * len(given)
    assert decoded[0] == decoded[1]


def test_thoughts_without_tokens_of_their_own_are_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, "qwen3", "<|endoftext|>", thoughts=False))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    ids, mask = one(messages_encoder(tokenizer, "qwen3"), messages)
    assert tokenizer.decode(ids) == "user\na\nassistant\n<think>\nc\n</think>\n\nb\n"
    assert tokenizer.decode(i for i, counts in zip(ids, mask, strict=True) if counts) == "<think>\nc\n</think>\n\nb"


def test_batches_and_bytes(tokenizers_of: Load) -> None:
    """A batch is its rows one by one; bytes of tokens add up to the bytes of the text; rows are named by place."""
    rng = random.Random(24)
    tokenizer = tokenizers_of("llama3")
    encoder = messages_encoder(tokenizer, "llama3")
    given: list[Any] = [dialogue(rng, rng.randrange(1, 4)) for _ in range(20)]
    for place in (0, 7, 19):
        given[place] = None
    batch = encoder.encode({"messages": given})
    assert batch.bad == {0: "no messages", 7: "no messages", 19: "no messages"}
    assert batch.rows_D.tolist() == [place for place in range(20) if place not in batch.bad]
    found = documents(batch)
    assert found == [one(encoder, given[row]) for row in batch.rows_D.tolist()]
    sizes = tokenizer.token_bytes()
    assert batch.text_bytes_D.tolist() == [int(sizes[ids].sum()) for ids, _ in found]
    types = (batch.ids_N, batch.lengths_D, batch.loss_mask_N, batch.text_bytes_D, batch.rows_D)
    assert [x.dtype for x in types] == [np.int32, np.int64, np.uint8, np.int64, np.int64]


@pytest.mark.parametrize("rows", [[], [None, []]])
def test_nothing_to_encode(tokenizers_of: Load, rows: list[Any]) -> None:
    batch = messages_encoder(tokenizers_of("qwen3"), "qwen3").encode({"messages": rows})
    assert len(batch.ids_N) == len(batch.lengths_D) == len(batch.loss_mask_N) == len(batch.rows_D) == 0
    assert batch.ids_N.dtype == np.int32 and len(batch.bad) == len(rows)


def test_options_are_checked_and_can_be_sent_to_workers(tokenizers_of: Load, tokenizer: SentencePieceTokenizer) -> None:
    options = InstructionOptions("prompt-response", "plain", prompt_column="q", response_column="a")
    assert pickle.loads(pickle.dumps(options)) == options
    assert InstructionEncoder(options, tokenizer).columns == ["q", "a"]
    with pytest.raises(ValueError, match=r"llama3 needs the special token <\|begin_of_text\|> and .* lacks"):
        messages_encoder(tokenizers_of("qwen3"), "llama3")
    with pytest.raises(ValueError, match="unknown chat template 'alpaca'; known are qwen3, llama3, plain"):
        messages_encoder(tokenizer, "alpaca")
    with pytest.raises(ValueError, match="unknown instruction format 'sharegpt'; known are messages"):
        InstructionEncoder(InstructionOptions("sharegpt", "plain"), tokenizer)
    with pytest.raises(ValueError, match="not 'first'"):
        messages_encoder(tokenizer, "plain", loss_turns="first")
