"""What cannot be read: file and row, to stop or to skip and count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_train.data.indexed import IndexedDataset
from moe_train.data.prepare import PrepareOptions, prepare
from moe_train.data.sources import SourceFile, Span, find_sources, read_rows
from moe_train.data.tokenizers import load_tokenizer
from moe_train.data.tokenizers.gigatoken_engine import fast_tokenizer

SKIP = PrepareOptions(on_bad="skip")

Run = Callable[..., dict[str, dict[str, Any]]]
TextsOf = Callable[[Path], list[str]]

BROKEN = [
    b'{"text": "good one"}',
    b'{"text": "no end',
    b'{"text": "\xff\xfe"}',
    b"[1, 2]",
    b'{"text": 5}',
    b'{"other": "x"}',
    b'{"text": ""}',
    b'{"text": "half a pair \\ud800"}',
    b'{"text": "good two"}',
]


def test_lines_stop_with_file_and_row(tmp_path: Path, run: Run, texts_of: TextsOf) -> None:
    (tmp_path / "broken.jsonl").write_bytes(b"\n".join(BROKEN))
    for piece_bytes in (1 << 20, 30):
        with pytest.raises(ValueError, match=r"broken.jsonl, row 1: bad JSON; --on-bad skip"):
            run([tmp_path / "broken.jsonl"], tmp_path / f"x{piece_bytes}", piece_bytes=piece_bytes)
        # What is done stays done when the user then wants such rows left out.
        manifest = run([tmp_path / "broken.jsonl"], tmp_path / f"x{piece_bytes}", SKIP, piece_bytes=piece_bytes)[""]
        assert manifest["skipped"] == {
            "null": 1, "empty": 1, "bad JSON": 1, "invalid UTF-8": 2, "no JSON object": 1, "no text": 1
        }  # fmt: skip
        assert [(p["file"], p["row"], p["rows"], p["reason"]) for p in manifest["problems"]] == [
            ("broken.jsonl", 1, 1, "bad JSON"),
            ("broken.jsonl", 2, 1, "invalid UTF-8"),
            ("broken.jsonl", 3, 1, "no JSON object"),
            ("broken.jsonl", 4, 1, "no text"),
            ("broken.jsonl", 5, 1, "null"),
            ("broken.jsonl", 6, 1, "empty"),
            ("broken.jsonl", 7, 1, "invalid UTF-8"),
        ]
        assert texts_of(tmp_path / f"x{piece_bytes}") == ["good one", "good two"]


def test_parquet_with_a_text_that_is_not_utf_8(tmp_path: Path, run: Run, texts_of: TextsOf) -> None:
    texts = pa.array([b"one", b"\xff\xfe", None, b"two"], pa.binary())
    # A writer that does not look makes such files.
    unchecked = pa.Array.from_buffers(pa.string(), len(texts), texts.buffers(), texts.null_count)
    pq.write_table(pa.table({"text": unchecked, "url": pa.array(list("abcd"))}), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match="in.parquet, row 1: invalid UTF-8"):
        run([tmp_path / "in.parquet"], tmp_path / "x")
    manifest = run([tmp_path / "in.parquet"], tmp_path / "x", SKIP)[""]
    assert (manifest["documents"], manifest["skipped"]) == (2, {"null": 1, "invalid UTF-8": 1})
    assert texts_of(tmp_path / "x") == ["one", "two"]


@pytest.fixture
def damaged(tmp_path: Path, make_texts: Callable[[int, int], list[str]]) -> tuple[Path, list[str], int]:
    """A parquet file, its texts, and the row group (of 100 rows) with a page whose checksum is wrong."""
    texts = make_texts(2, 500)
    path = tmp_path / "in/bad.parquet"
    path.parent.mkdir()
    pq.write_table(
        pa.table({"text": texts, "id": [str(i) for i in range(500)]}),
        path,
        row_group_size=100,
        write_page_checksum=True,
        use_dictionary=False,
        data_page_size=1000,
        write_batch_size=10,
    )
    column = pq.read_metadata(path).row_group(3).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 255
    path.write_bytes(content)
    return path, texts, 3


def test_a_damaged_page(
    tmp_path: Path, run: Run, texts_of: TextsOf, damaged: tuple[Path, list[str], int], write_parquet
) -> None:
    path, texts, group = damaged
    write_parquet(path.parent / "other.parquet", ["after"])
    with pytest.raises(ValueError, match=r"bad\.parquet cannot be read as parquet behind row 3\d\d"):
        run([path.parent], tmp_path / "x")
    manifest = run([path.parent], tmp_path / "x", SKIP)[""]
    lost = manifest["skipped"]["damaged page"]
    assert manifest["problems"] == [
        {"file": "bad.parquet", "row": (group + 1) * 100 - lost, "rows": lost, "reason": "damaged page"}
    ]
    assert 0 < lost <= 100
    assert texts_of(tmp_path / "x") == texts[: (group + 1) * 100 - lost] + texts[(group + 1) * 100 :] + ["after"]


def test_a_disk_that_fails_is_no_damaged_page(
    tmp_path: Path, run: Run, damaged: tuple[Path, list[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows must not be left out because a network was away."""

    def fails(self: SourceFile) -> Any:
        raise OSError(5, "Input/output error", self.path)

    monkeypatch.setattr(SourceFile, "open", fails)
    with pytest.raises(OSError, match="Input/output error"):
        run([damaged[0]], tmp_path / "x", SKIP)


def test_a_damaged_page_in_a_piece_behind_the_limit_is_not_met(
    tmp_path: Path, run: Run, texts_of: TextsOf, damaged: tuple[Path, list[str], int]
) -> None:
    path, texts, _ = damaged
    for workers in (1, 2):
        run([path], tmp_path / f"x{workers}", PrepareOptions(max_documents=299), workers=workers, piece_bytes=1)
        assert texts_of(tmp_path / f"x{workers}") == texts[:299]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_bad_row_behind_the_limit_is_not_met_however_the_work_is_cut(tmp_path: Path, run: Run, kind: str) -> None:
    rng = np.random.default_rng()
    for number in range(2):
        count, bad = 16, int(rng.integers(1, 16))
        texts = [f"line {i} " + "x " * int(rng.integers(0, 9)) for i in range(count)]
        path = tmp_path / f"{number}.{kind}"
        if kind == "jsonl":
            path.write_text("\n".join("{" if i == bad else json.dumps({"text": t}) for i, t in enumerate(texts)))
        else:
            column = pa.array([b"\xff" if i == bad else text.encode() for i, text in enumerate(texts)], pa.binary())
            pq.write_table(pa.table({"text": column}), path, row_group_size=3)
        whole = run([path], tmp_path / f"all{number}", PrepareOptions(on_bad="skip"))[""]
        lengths = [len(IndexedDataset(tmp_path / f"all{number}_text_document").document(i)) for i in range(count - 1)]
        assert whole["tokens"] == sum(lengths)
        for wanted in {bad - 1, bad, bad + 1} & set(range(1, count - 1)):
            # As many tokens as so many documents have, and some that are no document more.
            tokens = sum(lengths[:wanted]) + int(rng.integers(0, lengths[wanted]))
            for limit in ({"max_documents": wanted}, {"max_tokens": tokens}):
                for piece in (40, 1 << 20):
                    out = tmp_path / f"{number}.{wanted}.{next(iter(limit))}.{piece}"
                    # The document that goes beyond the tokens is read too, and what is before it.
                    if wanted < bad or (wanted == bad and "max_documents" in limit):
                        manifest = run([path], out, PrepareOptions(**limit), piece_bytes=piece)[""]
                        assert (manifest["documents"], manifest["tokens"]) == (wanted, sum(lengths[:wanted]))
                    else:
                        with pytest.raises(ValueError, match=f"row {bad}: "):
                            run([path], out, PrepareOptions(**limit), piece_bytes=piece)


def test_the_first_bad_row_is_named_whoever_finds_one(tmp_path: Path, run: Run) -> None:
    lines = [json.dumps({"text": f"line {i}"}) for i in range(400)]
    for place in (137, 200, 399):
        lines[place] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for workers in (1, 3):
        with pytest.raises(ValueError, match="a.jsonl, row 137: bad JSON"):
            run([tmp_path / "a.jsonl"], tmp_path / f"x{workers}", workers=workers, piece_bytes=300)
    with pytest.raises(ValueError, match="a.jsonl, row 399: bad JSON"):
        run([tmp_path / "a.jsonl"], tmp_path / "y", task=(2, 2), piece_bytes=6000)


def test_a_document_of_50_megabytes(tmp_path: Path, byte_level: Path, write_parquet) -> None:
    huge = "the router sends é " * 2_500_000
    assert len(huge.encode()) == 50_000_000
    source = write_parquet(tmp_path / "in.parquet", ["small", huge, "small too"])
    tokenizer = fast_tokenizer(load_tokenizer(byte_level))
    prepare(find_sources([source]), tmp_path / "x", tokenizer)
    dataset = IndexedDataset(tmp_path / "x_text_document")
    assert [tokenizer.decode(dataset.document(i)) for i in (0, 2)] == ["small", "small too"]
    ids = dataset.document(1)
    assert tokenizer.token_bytes()[ids].sum() == 50_000_000
    assert tokenizer.decode(ids[-1000:]) == huge[-len(tokenizer.decode(ids[-1000:])) :]


def test_arrays_of_tokens(tmp_path: Path, run: Run, texts_of: TextsOf, tokenizer, make_texts) -> None:
    ids = [one[:20] for one in tokenizer.encode_batch(make_texts(1, 30)) if len(one) >= 20]
    np.save(tmp_path / "rows.npy", np.stack(ids))
    np.save(tmp_path / "single.npy", ids[0].astype(np.uint16))
    run([tmp_path / "rows.npy", tmp_path / "single.npy"], tmp_path / "x")
    texts = [tokenizer.decode(one) for one in ids]
    assert texts_of(tmp_path / "x") == [*texts, texts[0]]
    run([tmp_path / "rows.npy"], tmp_path / "y", PrepareOptions(max_documents=3))
    assert texts_of(tmp_path / "y") == texts[:3]
    np.save(tmp_path / "rows.npy", np.full((2, 3), tokenizer.vocab_size))
    with pytest.raises(ValueError, match="rows.npy has token ids outside the tokenizer"):
        run([tmp_path / "rows.npy"], tmp_path / "z")


def test_all_kinds_in_one_run(tmp_path: Path, run: Run, texts_of: TextsOf, write_parquet) -> None:
    folder = tmp_path / "in"
    write_parquet(folder / "b.parquet", ["from parquet"])
    content = b'{"text": "from json", "id": "name", "dump": "d"}\n'
    (folder / "a.jsonl.zst").write_bytes(pa.Codec("zstd").compress(content, asbytes=True))
    (folder / "c.txt").write_text("from text")
    run([folder], tmp_path / "x")
    assert texts_of(tmp_path / "x") == ["from json", "from parquet", "from text"]
    rows = pq.read_table(tmp_path / "x.documents.parquet").to_pylist()
    assert [(row["source"], row["row"], row["id"], row["domain"]) for row in rows] == [
        ("a.jsonl.zst", 0, "name", "d"),
        ("b.parquet", 0, "b-0", "one"),
        ("c.txt", 0, None, ""),
    ]


def test_lines_of_a_part_are_numbered_from_its_first(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\nb\nc\n")
    (file,) = find_sources([tmp_path / "a.txt"], "lines")
    assert [(rows.first_row, rows.objects("text")) for rows in read_rows(file, ["text"], Span(2, 6))] == [
        (0, ["b", "c"])
    ]
