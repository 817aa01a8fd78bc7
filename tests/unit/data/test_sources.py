"""Files of every kind that text comes in, read as rows, with what is wrong in them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_train.data.indexed import IndexedDataset
from moe_train.data.prepare import PrepareOptions, prepare
from moe_train.data.sources import find_sources, first_texts, read_rows, sample_texts
from moe_train.data.sources.rows import ROWS_PER_BATCH, SourceFile

ONE_SET = PrepareOptions(validation_fraction=0.0)
SKIP = PrepareOptions(validation_fraction=0.0, on_bad="skip")


def compressed(path: Path, content: bytes) -> Path:
    """Writes by the ending of the name."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        path.write_bytes(pa.Codec("zstd").compress(content, asbytes=True))
    else:
        path.write_bytes(content)
    return path


def jsonl(objects: list[Any]) -> bytes:
    return b"".join(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in objects)


def all_values(file: SourceFile, column: str) -> list[Any]:
    found: list[Any] = []
    for rows in read_rows(file, [column]):
        assert rows.first_row == len(found)
        found += rows.values[column]
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "c4-validation.00000-of-00008.json.gz", "a.jsonl.zst"])
def test_jsonl(tmp_path: Path, make_texts: Callable[[int, int], list[str]], name: str) -> None:
    texts = [*make_texts(1, ROWS_PER_BATCH + 10), "two\nlines \u2028 é", ""]
    compressed(tmp_path / name, jsonl([{"text": text, "url": "u"} for text in texts]))
    (file,) = find_sources([tmp_path])
    assert all_values(file, "text") == texts
    assert all_values(file, "id") == [None] * len(texts)
    assert first_texts([file], "text", 5) == texts[:5]
    assert list(sample_texts([file], "text", 10**9)) == texts


@pytest.mark.parametrize("name", ["news.en-00001-of-00100", "lines.txt", "lines.txt.gz"])
def test_a_document_per_line(tmp_path: Path, name: str) -> None:
    """As One Billion Word is published."""
    compressed(tmp_path / name, "first .\nsecond é\r\n\nlast".encode())
    (file,) = find_sources([tmp_path / name], "lines")
    assert all_values(file, "text") == ["first .", "second é", "", "last"]


def test_a_document_per_file(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt.gz"):
        compressed(tmp_path / name, f"all of\n{name}\n".encode())
    files = find_sources([tmp_path])
    assert [(file.name, all_values(file, "text")) for file in files] == [
        ("a.txt.gz", ["all of\na.txt.gz\n"]),
        ("b.txt", ["all of\nb.txt\n"]),
    ]


def test_what_no_ending_tells(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(ValueError, match=r"notes.md is of no known kind .*--text-format"):
        find_sources([tmp_path / "notes.md"])
    with pytest.raises(FileNotFoundError, match="holds no file that ends in"):
        find_sources([tmp_path])
    assert find_sources([tmp_path / "notes.md"], "document")[0].kind == "document"


def broken_jsonl(folder: Path) -> Path:
    lines = [
        b'{"text": "good one"}',
        b'{"text": "no end',
        b'{"text": "\xff\xfe"}',
        b"[1, 2]",
        b'{"text": 5}',
        b'{"other": "x"}',
        b'{"text": ""}',
        b'{"text": "good two"}',
    ]
    return compressed(folder / "broken.jsonl", b"\n".join(lines))


def test_rows_that_cannot_be_read_stop_with_file_and_row(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"broken.jsonl, row 1: bad JSON; --on-bad skip"):
        prepare([broken_jsonl(tmp_path)], tmp_path / "out", tokenizer, ONE_SET)


def test_rows_that_cannot_be_read_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    manifest = prepare([broken_jsonl(tmp_path)], tmp_path / "out", tokenizer, SKIP)["train"]
    assert manifest["skipped"] == {
        "null": 1, "empty": 1, "bad JSON": 1, "invalid UTF-8": 1, "no JSON object": 1, "no text": 1
    }  # fmt: skip
    assert [(p["row"], p["reason"]) for p in manifest["problems"]] == [
        (1, "bad JSON"), (2, "invalid UTF-8"), (3, "no JSON object"), (4, "no text")
    ]  # fmt: skip
    dataset = IndexedDataset(tmp_path / "out" / "train")
    found = [tokenizer.decode(dataset.document(i)) for i in range(len(dataset))]
    assert found == ["good one", "good two"]


def test_parquet_with_a_text_that_is_not_utf_8(tmp_path: Path, tokenizer: Any) -> None:
    texts = pa.array([b"one", b"\xff\xfe", None, b"two"], pa.binary())
    # A writer that does not look makes such files.
    unchecked = pa.Array.from_buffers(pa.string(), len(texts), texts.buffers(), texts.null_count)
    pq.write_table(pa.table({"text": unchecked, "url": pa.array(list("abcd"))}), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match="in.parquet, row 1: invalid UTF-8"):
        prepare([tmp_path / "in.parquet"], tmp_path / "out", tokenizer, ONE_SET)
    manifest = prepare([tmp_path / "in.parquet"], tmp_path / "out", tokenizer, SKIP)["train"]
    assert (manifest["documents"], manifest["skipped"]) == (2, {"null": 1, "empty": 0, "invalid UTF-8": 1})


def test_a_truncated_archive_names_file_and_line(tmp_path: Path, make_texts: Callable[[int, int], list[str]]) -> None:
    path = compressed(tmp_path / "a.jsonl.gz", jsonl([{"text": text} for text in make_texts(1, 3000)]))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"a.jsonl.gz cannot be read behind line \d+"):
        all_values(find_sources([path])[0], "text")


def test_a_very_long_line(tmp_path: Path) -> None:
    text = "".join(random.Random(3).choices("abc \né", k=5_000_000))
    compressed(tmp_path / "a.jsonl", jsonl([{"text": "x"}, {"text": text}, {"text": "y"}]))
    assert all_values(find_sources([tmp_path])[0], "text") == ["x", text, "y"]


def test_all_kinds_in_one_run(tmp_path: Path, tokenizer: Any, write_parquet: Callable[..., Path]) -> None:
    folder = tmp_path / "in"
    write_parquet(folder / "b.parquet", ["from parquet"])
    compressed(folder / "a.jsonl.zst", jsonl([{"text": "from json", "id": "name", "dump": "d"}]))
    compressed(folder / "c.txt", b"from text")
    prepare([folder], tmp_path / "out", tokenizer, ONE_SET)
    dataset = IndexedDataset(tmp_path / "out" / "train")
    found = [tokenizer.decode(dataset.document(i)) for i in range(3)]
    assert found == ["from json", "from parquet", "from text"]
    rows = pq.read_table(tmp_path / "out" / "train.documents.parquet").to_pylist()
    assert [(row["source"], row["row"], row["id"], row["domain"]) for row in rows] == [
        ("a.jsonl.zst", 0, "name", "d"),
        ("b.parquet", 0, "b-0", "one"),
        ("c.txt", 0, "c.txt:0", ""),
    ]
