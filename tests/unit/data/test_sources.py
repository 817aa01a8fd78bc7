"""Files of every kind that text comes in, read as rows, with what is wrong in them."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_train.data.sources import SourceFile, Span, find_sources, first_texts, read_rows, sample_texts
from moe_train.data.sources.lines import lines_before
from moe_train.data.sources.rows import ROWS_PER_BATCH
from moe_train.data.sources.tokens import read_token_array


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
        found += rows.objects(column)
        assert len(found) == rows.first_row + rows.count
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "c4-validation.00000-of-00008.json.gz", "a.jsonl.zst"])
def test_jsonl(tmp_path: Path, make_texts: Callable[[int, int], list[str]], name: str) -> None:
    texts = [*make_texts(1, ROWS_PER_BATCH + 10), "two\nlines \u2028 é", ""]
    compressed(tmp_path / name, jsonl([{"text": text, "url": "u"} for text in texts]))
    (file,) = find_sources([tmp_path])
    assert all_values(file, "text") == texts
    assert all_values(file, "id") == [None] * len(texts)
    assert first_texts([file], ["text"], 5) == texts[:5]
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


def test_a_truncated_archive_names_file_and_line(tmp_path: Path, make_texts: Callable[[int, int], list[str]]) -> None:
    path = compressed(tmp_path / "a.jsonl.gz", jsonl([{"text": text} for text in make_texts(1, 3000)]))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"a.jsonl.gz cannot be read behind line \d+"):
        all_values(find_sources([path])[0], "text")


def test_a_very_long_line(tmp_path: Path) -> None:
    text = "".join(random.Random(3).choices("abc \né", k=5_000_000))
    compressed(tmp_path / "a.jsonl", jsonl([{"text": "x"}, {"text": text}, {"text": "y"}]))
    assert all_values(find_sources([tmp_path])[0], "text") == ["x", text, "y"]


@pytest.mark.parametrize("end", [b"\n", b""])
def test_parts_of_lines_are_disjoint_and_complete(tmp_path: Path, end: bytes) -> None:
    """However bytes are cut, each line is in one part, and parts know what line they begin with."""
    rng = random.Random(int.from_bytes(os.urandom(8), "little"))
    lines = ["é" * rng.choice([0, 1, 2, 9]) + str(i) for i in range(60)]
    path = tmp_path / "lines.txt"
    path.write_bytes("\n".join(lines).encode() + end)
    (file,) = find_sources([path], "lines")
    for step in (1, 2, 7, 50, 10_000):
        found: list[str] = []
        for start in range(0, file.size, step):
            part = [
                text for rows in read_rows(file, ["text"], Span(start, start + step)) for text in rows.objects("text")
            ]
            if part:
                assert lines[lines_before(file, start)] == part[0]
            found += part
        assert found == lines


def test_row_groups_are_parts_of_parquet(
    tmp_path: Path, write_parquet: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [str(i) for i in range(50)]
    (file,) = find_sources([write_parquet(tmp_path / "a.parquet", texts, row_group_size=8)])
    parts = [(0, 2), (2, 3), (3, 7)]
    found = [[t for rows in read_rows(file, ["text"], Span(*part)) for t in rows.objects("text")] for part in parts]
    assert found == [texts[:16], texts[16:24], texts[24:]]
    assert [(rows.first_row, rows.count) for rows in read_rows(file, ["text"], Span(2, 5))] == [(0, 8), (8, 16)]
    size = pq.ParquetFile(file.path).metadata.row_group(3).total_byte_size
    for room, wanted in ((2 * size, [(0, 8), (8, 16), (24, 8)]), (2 * size - 1, [(0, 8), (8, 8), (16, 8), (24, 8)])):
        monkeypatch.setattr("moe_train.data.sources.parquet.BATCH_BYTES", room)
        assert [(rows.first_row, rows.count) for rows in read_rows(file, ["text"], Span(2, 6))] == wanted


def test_repeated_texts_take_no_more_memory(
    tmp_path: Path, write_parquet: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parquet holds a repeated text once per row group, and says so of its size."""
    room = 1 << 18
    monkeypatch.setattr("moe_train.data.sources.parquet.BATCH_BYTES", room)
    (file,) = find_sources([write_parquet(tmp_path / "a.parquet", ["x" * 5000] * 400, row_group_size=20)])
    assert pq.ParquetFile(file.path).metadata.row_group(0).total_byte_size < 10_000
    sizes = [rows.values["text"].nbytes for rows in read_rows(file, ["text"])]
    assert sum(sizes) > 400 * 5000 and max(sizes) <= room
    assert len(sizes) < 12, "neighbours are read together all the same"


def test_text_in_other_types_of_arrow(tmp_path: Path) -> None:
    texts = ["one", None, "é", "one"]
    kinds = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int8(), pa.string())]
    for number, kind in enumerate(kinds):
        encoded = [None if t is None else t.encode() for t in texts] if "binary" in str(kind) else texts
        pq.write_table(pa.table({"text": pa.array(encoded).cast(kind)}), tmp_path / f"{number}.parquet")
    for file in find_sources([tmp_path]):
        (rows,) = read_rows(file, ["text"])
        column, bad = rows.texts("text")
        assert (column.to_pylist(), bad, column.type) == (texts, {}, pa.large_string())
    pq.write_table(pa.table({"text": [[1], [2]]}), tmp_path / "list.parquet")
    (rows,) = read_rows(find_sources([tmp_path / "list.parquet"])[0], ["text"])
    with pytest.raises(ValueError, match="column text holds list.*, not text"):
        rows.texts("text")


def test_what_preparation_writes_is_no_source(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    write_parquet(tmp_path / "a.parquet", ["text"])
    for name in ("a.json", "x.manifest.json", "x.token_bytes.npy", ".hidden.jsonl", ".cache/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"content_sha256": "0"}')
    (tmp_path / "old.work").mkdir()
    for name in ("old.work/job.json", "old.work/000000.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    write_parquet(tmp_path / "x.documents.parquet", ["text"])
    assert [file.name for file in find_sources([tmp_path])] == ["a.parquet"]
    assert [file.name for file in find_sources([tmp_path / "*.*"])] == ["a.parquet"]
    (tmp_path / "a.json").write_text('{"text": "a row beside the parquet file"}')
    assert [file.name for file in find_sources([tmp_path])] == ["a.json", "a.parquet"]


def test_links_and_folders_of_a_glob(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    """As a cache of the hub has files, and as FineWeb has folders."""
    blob = write_parquet(tmp_path / "blobs/deadbeef", ["one"])
    for place in ("dumps/A/000.parquet", "dumps/B/000.parquet"):
        (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / "dumps/A/000.parquet").symlink_to(blob)
    write_parquet(tmp_path / "dumps/B/000.parquet", ["two"])
    write_parquet(tmp_path / "dumps/C.parquet", ["three"])
    (tmp_path / "dumps/B/again").symlink_to(tmp_path / "dumps")  # a circle
    wanted = ["A/000.parquet", "B/000.parquet", "C.parquet"]
    assert [file.name for file in find_sources([tmp_path / "dumps"])] == wanted
    assert [file.name for file in find_sources([f"{tmp_path}/dumps/*"])] == wanted
    assert len(find_sources([tmp_path / "dumps", blob.parent / "deadbeef"][:1] + [tmp_path / "dumps/A"])) == 3


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    with pytest.raises(ValueError, match="the name of a source is not UTF-8: .*caf"):
        find_sources([tmp_path])


def test_urls(tmp_path: Path, write_parquet: Callable[..., Path], make_texts: Callable[[int, int], list[str]]) -> None:
    """A store that fsspec knows, in memory; folders and globs; the same rows as from the disk."""
    import fsspec

    texts = make_texts(1, 40)
    store = fsspec.filesystem("memory")
    local = write_parquet(tmp_path / "in/a.parquet", texts)
    (tmp_path / "in/sub").mkdir()
    compressed(tmp_path / "in/sub/b.jsonl.gz", jsonl([{"text": text} for text in texts]))
    compressed(tmp_path / "in/sub/c.txt", "é all".encode())
    np.save(tmp_path / "in/d.npy", np.arange(6).reshape(2, 3))
    store.put(str(tmp_path / "in"), "/bucket/in", recursive=True)
    try:
        remote, here = find_sources(["memory://bucket/in"]), find_sources([tmp_path / "in"])
        assert [(f.name, f.kind, f.size) for f in remote] == [(f.name, f.kind, f.size) for f in here]
        for one, other in zip(remote, here, strict=True):
            assert not one.is_local
            if one.kind == "tokens":
                assert read_token_array(one).tolist() == read_token_array(other).tolist() == [[0, 1, 2], [3, 4, 5]]
            else:
                assert all_values(one, "text") == all_values(other, "text")
        assert [file.name for file in find_sources(["memory://bucket/in/*.parquet"])] == [local.name]
        assert [file.name for file in find_sources(["memory://bucket/in/a.parquet"])] == [local.name]
        with pytest.raises(FileNotFoundError, match="memory://bucket/nothing"):
            find_sources(["memory://bucket/nothing"])
        with pytest.raises(ValueError, match="nosuch://x cannot be opened: .*nosuch"):
            find_sources(["nosuch://x"])
    finally:
        store.rm("/bucket", recursive=True)


def test_token_arrays_that_are_none(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"a.npy holds float32 of shape \(2, 3\); token ids are integers"):
        read_token_array(find_sources([tmp_path / "a.npy"])[0])
    (tmp_path / "b.npy").write_bytes(b"no")
    with pytest.raises(ValueError, match="b.npy is not an array of numpy"):
        read_token_array(find_sources([tmp_path / "b.npy"])[0])


def test_sources_are_found_once_and_sampled_evenly(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    for name in ("x/b", "x/a", "y/c"):
        write_parquet(tmp_path / f"{name}.parquet", [f"{name} {i:06d} " + "z" * 90 for i in range(500)])
    files = find_sources([tmp_path, tmp_path / "x/a.parquet", str(tmp_path / "*/b.parquet")])
    assert [file.name for file in files] == ["x/a.parquet", "x/b.parquet", "y/c.parquet"]
    everything = list(sample_texts(files, "text", 10**9))
    assert len(everything) == 1500
    some = list(sample_texts(files, "text", 30_000))
    assert some == list(sample_texts(files, "text", 30_000))
    assert 200 < len(some) < 500 and {text[:3] for text in some} == {"x/a", "x/b", "y/c"}
    with pytest.raises(ValueError, match="no column body"):
        list(sample_texts(files, "body", 100))
