from __future__ import annotations

import random

from moe_train.data.near_duplicates import Groups, join_near_duplicates


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(10**9)}" for _ in range(count)]


def grouped(texts: list[str]) -> list[int]:
    groups = Groups(len(texts))
    join_near_duplicates(texts, groups)
    return [groups.find(index) for index in range(len(texts))]


def test_copies_excerpts_and_edits_join_and_others_do_not() -> None:
    rng = random.Random(1)
    original, other = words(rng, 300), words(rng, 300)
    edited = [word if i % 40 else "changed" for i, word in enumerate(original)]
    texts = [
        " ".join(original),
        " ".join(other),
        "\n".join(original),  # layout does not count
        " ".join(original[100:150]),  # an excerpt
        " ".join(edited),
        " ".join(words(rng, 270) + original[:30]),  # a common header
    ]
    assert grouped(texts) == [0, 1, 0, 0, 0, 5]


def test_groups_are_transitive() -> None:
    rng = random.Random(2)
    a, b = words(rng, 100), words(rng, 100)
    assert grouped([" ".join(a), " ".join(b), " ".join(a + b)]) == [0, 0, 0]


def test_as_a_brute_force_comparison_finds_them() -> None:
    rng = random.Random(3)
    parts = [words(rng, 12) for _ in range(12)]
    texts = [" ".join(sum(rng.sample(parts, rng.randrange(1, 4)), [])) for _ in range(40)]
    shingles = [{tuple(row[i : i + 8]) for i in range(len(row) - 7)} for row in (text.split() for text in texts)]
    expected = Groups(len(texts))
    for left in range(len(texts)):
        for right in range(left):
            if 2 * len(shingles[left] & shingles[right]) >= min(len(shingles[left]), len(shingles[right])):
                expected.join(left, right)
    assert grouped(texts) == [expected.find(index) for index in range(len(texts))]
    assert len(set(grouped(texts))) < len(texts)


def test_no_and_short_texts() -> None:
    assert grouped([]) == []
    assert grouped(["one two", "three", "one two"]) == [0, 1, 0]
