"""Tokens to text in pieces: whole characters, and nothing of a stop string."""

from __future__ import annotations

import random

import pytest

from moe_train.evaluation.generation.text import TextStream, Vocabulary

BYTES = Vocabulary([bytes([byte]) for byte in range(256)])


def pieces(content: bytes, stop: tuple[str, ...] = (), vocabulary: Vocabulary = BYTES) -> tuple[list[str], bool]:
    stream, found = TextStream(vocabulary, stop), []
    for byte in content:
        found.append(stream.add(byte))
        if stream.stopped:
            return found, True
    return [*found, stream.end()], False


def test_characters_come_whole() -> None:
    found, _ = pieces("aé→🙂b".encode())
    assert found == ["a", "", "é", "", "", "→", "", "", "", "🙂", "b", ""]


def test_a_cut_character_becomes_a_replacement_and_only_at_the_end() -> None:
    assert pieces("a🙂".encode()[:-1]) == (["a", "", "", "", "\ufffd"], False)
    assert "".join(pieces(b"a\xe2b\xff")[0]) == b"a\xe2b\xff".decode("utf-8", errors="replace")


def test_pieces_are_the_text_whatever_the_bytes() -> None:
    seed = random.randrange(2**31)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(300):
        content = bytes(draw.choice(b"a\xc3\xa9\xe2\x86\x92\xf0\x9f\x99\x82") for _ in range(draw.randrange(30)))
        assert "".join(pieces(content)[0]) == content.decode("utf-8", errors="replace")


def test_tokens_without_bytes_and_beyond_the_tokenizer_have_no_text() -> None:
    stream = TextStream(Vocabulary([b"a", b""]))
    assert [stream.add(token) for token in (0, 1, 999)] == ["a", "", ""]
    assert TextStream(Vocabulary()).add(3) == ""


@pytest.mark.parametrize(
    ("text", "stop", "want", "stopped"),
    [
        ("one. two", (".",), "one", True),
        ("one\n\ntwo", ("\n\n",), "one", True),
        ("one\ntwo", ("\n\n",), "one\ntwo", False),
        ("aaab", ("aab",), "a", True),
        ("abcabd", ("abd", "zz"), "abc", True),
        ("xyz", ("yz", "xyz"), "", True),
        ("ends with a beg", ("beginning",), "ends with a beg", False),
        ("é→!", ("→",), "é", True),
        ("nothing", (), "nothing", False),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], want: str, stopped: bool) -> None:
    found, ended = pieces(text.encode(), stop)
    assert ("".join(found), ended) == (want, stopped)


def test_a_stop_string_inside_of_one_token_cuts_it() -> None:
    stream = TextStream(Vocabulary([b"start ", b"one END two END"]), ("END",))
    assert [stream.add(0), stream.add(1)] == ["start ", "one "]
    assert stream.stopped and stream.end() == ""


def test_only_what_may_become_a_stop_string_waits() -> None:
    stream = TextStream(BYTES, ("stop",))
    assert [stream.add(byte) for byte in b"a st st"] == ["a", " ", "", "", "st ", "", ""]
    assert stream.end() == "st"


def test_every_cut_of_a_random_text_is_found() -> None:
    """Against the definition: the text up to the first stop string that is complete."""
    seed = random.randrange(2**31)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(500):
        text = "".join(draw.choice("ab") for _ in range(draw.randrange(1, 15)))
        stop = tuple("".join(draw.choice("ab") for _ in range(draw.randrange(1, 5))) for _ in range(draw.randrange(3)))
        ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(one) for one in stop)]
        want = text
        if ends:
            want = text[: min(text[: ends[0]].index(one) for one in stop if one in text[: ends[0]])]
        assert "".join(pieces(text.encode(), stop)[0]) == want, (text, stop)
