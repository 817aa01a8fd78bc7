"""Filters, sampling and limits; and any text whatever."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from moe_train.data.indexed import IndexedDataset
from moe_train.data.prepare import How, PrepareOptions, prepare
from moe_train.data.sources import find_sources
from tests.unit.data.prepare.conftest import contents, origins

Run = Callable[..., dict[str, dict[str, Any]]]
TextsOf = Callable[[Path], list[str]]


def test_filters(tmp_path: Path, run: Run, texts_of: TextsOf) -> None:
    rows = [
        {"text": "kept é", "language_score": 0.9, "dump": "a", "url": "https://good.org/1"},
        {"text": "kept too", "language_score": 1, "dump": "b", "url": "https://good.org/2"},
        {"text": "score", "language_score": 0.5, "dump": "a", "url": "https://good.org/3"},
        {"text": "no score", "dump": "a", "url": "https://good.org/4"},
        {"text": "dump", "language_score": 0.9, "dump": "c", "url": "https://good.org/5"},
        {"text": "no dump", "language_score": 0.9, "url": "https://good.org/6"},
        {"text": "not good", "language_score": 0.9, "dump": "a", "url": "https://other.org/7"},
        {"text": "excluded", "language_score": 0.9, "dump": "a", "url": "https://good.org/ads/8"},
        {"text": "éé", "language_score": 0.9, "dump": "a", "url": "https://good.org/9"},
        {"text": "long" * 9, "language_score": 0.9, "dump": "a", "url": "https://good.org/10"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PrepareOptions(
        min_language_score=0.8,
        dumps=("a", "b"),
        url_include=r"^https://good\.",
        url_exclude="/ads/",
        min_chars=3,
        max_chars=30,
    )
    manifest = run([tmp_path / "in.jsonl"], tmp_path / "x", options)[""]
    assert texts_of(tmp_path / "x") == ["kept é", "kept too"]
    assert manifest["skipped"] == {"language score": 2, "dump": 2, "url": 2, "too short": 1, "too long": 1}


def test_sample(tmp_path: Path, run: Run, texts_of: TextsOf, write_parquet, make_texts) -> None:
    texts = make_texts(1, 600)
    source = write_parquet(tmp_path / "in.parquet", texts, row_group_size=50)
    found = {}
    for name, share, seed in (("a", 0.3, 0), ("b", 0.3, 1), ("c", 0.6, 0)):
        manifest = run([source], tmp_path / name, PrepareOptions(sample=share, sample_seed=seed))[""]
        found[name] = texts_of(tmp_path / name)
        assert manifest["skipped"]["not sampled"] == 600 - len(found[name])
        assert abs(len(found[name]) - 600 * share) < 70
        assert found[name] == [text for text in texts if text in set(found[name])]
    assert set(found["a"]) != set(found["b"]) and set(found["a"]) <= set(found["c"])
    # The id decides, not the place.
    ids = [f"in-{row}" for row in range(600)][::-1]
    run([write_parquet(tmp_path / "back.parquet", texts[::-1], id=ids)], tmp_path / "d", PrepareOptions(sample=0.3))
    assert set(texts_of(tmp_path / "d")) == set(found["a"])


@pytest.mark.parametrize("workers", [1, 2])
def test_limits(tmp_path: Path, run: Run, texts_of: TextsOf, write_parquet, make_texts, workers: int) -> None:
    texts = make_texts(1, 200)
    source = write_parquet(tmp_path / "in.parquet", texts, row_group_size=9)
    run([source], tmp_path / "all")
    ends = np.cumsum(IndexedDataset(tmp_path / "all_text_document").sequence_lengths)
    for count in (1, 9, 10, 100, 200, 5000) if workers == 1 else (100,):
        run([source], tmp_path / f"d{count}", PrepareOptions(max_documents=count), workers=workers)
        assert texts_of(tmp_path / f"d{count}") == texts[:count]
    limits = (int(ends[50]) + 1, int(ends[0]), int(ends[8]), int(ends[9]) - 1, 10**9)
    for tokens in limits if workers == 1 else limits[:1]:
        run([source], tmp_path / f"t{tokens}", PrepareOptions(max_tokens=tokens), workers=workers)
        assert texts_of(tmp_path / f"t{tokens}") == texts[: int(np.searchsorted(ends, tokens, side="right"))]
    with pytest.raises(ValueError, match="no document is left"):
        run([source], tmp_path / "none", PrepareOptions(max_tokens=int(ends[0]) - 1), workers=workers)
    both = PrepareOptions(max_tokens=int(ends[60]), max_documents=40, validation_fraction=0.4)
    run([source], tmp_path / "both", both, workers=workers)
    assert len(texts_of(tmp_path / "both_train")) + len(texts_of(tmp_path / "both_validation")) == 40
    rows = origins(tmp_path / "both_train") + origins(tmp_path / "both_validation")
    assert {row["row"] for row in rows} == set(range(40))


def test_without_ends(tmp_path: Path, run: Run, tokenizer, write_parquet, make_texts) -> None:
    texts = make_texts(1, 30)
    run([write_parquet(tmp_path / "in.parquet", texts)], tmp_path / "x", PrepareOptions(append_eod=False))
    dataset = IndexedDataset(tmp_path / "x_text_document")
    assert [dataset.document(i).tolist() for i in range(30)] == [ids.tolist() for ids in tokenizer.encode_batch(texts)]


DOCUMENTS = st.lists(
    st.one_of(
        st.none(),
        st.text(max_size=40),
        st.text(alphabet="ab \n\u2581<|endoftext|>é\U0001f600", max_size=40),
        st.integers(1000, 40_000).map(lambda size: "huge é" * (size // 6)),
    ),
    max_size=30,
)


@given(
    documents=DOCUMENTS,
    kind=st.sampled_from(["parquet", "jsonl"]),
    piece=st.integers(100, 9000),
    tasks=st.integers(1, 3),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Any,
    write_parquet: Callable[..., Path],
    documents: list[str | None],
    kind: str,
    piece: int,
    tasks: int,
) -> None:
    """Arbitrary Unicode, nulls, empty and huge documents, however the work is cut and shared out."""
    folder = tmp_path_factory.mktemp("any")
    wanted = [text for text in ["first", *documents] if text]
    if kind == "parquet":
        source = write_parquet(folder / "in.parquet", ["first", *documents], row_group_size=3)
    else:
        source = folder / "in.jsonl"
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ["first", *documents]]
        source.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    files = find_sources([source])
    for task in range(tasks, 0, -1):
        prepare(files, folder / "x", tokenizer, PrepareOptions(), How(piece_bytes=piece, task=(task, tasks)))
    manifest = prepare(files, folder / "x", tokenizer, PrepareOptions(), How(piece_bytes=piece, merge_only=True))[""]
    dataset = IndexedDataset(folder / "x_text_document")
    dataset.verify()
    assert [tokenizer.decode(dataset.document(i)) for i in range(len(dataset))] == wanted
    assert manifest["skipped"].get("null", 0) + manifest["skipped"].get("empty", 0) == len(documents) + 1 - len(wanted)
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in wanted)
    prepare(files, folder / "whole/x", tokenizer, PrepareOptions())
    assert contents(folder / "whole").items() <= contents(folder).items()


@pytest.mark.slow
@given(documents=DOCUMENTS, piece=st.integers(100, 9000), workers=st.integers(2, 5))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_with_any_number_of_workers(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Any,
    write_parquet: Callable[..., Path],
    documents: list[str | None],
    piece: int,
    workers: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    files = find_sources([write_parquet(folder / "in.parquet", ["first", *documents], row_group_size=3)])
    prepare(files, folder / "one/x", tokenizer, PrepareOptions(), How(workers=1))
    prepare(files, folder / "many/x", tokenizer, PrepareOptions(), How(workers=workers, piece_bytes=piece))
    assert contents(folder / "many") == contents(folder / "one")
