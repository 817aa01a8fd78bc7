"""What could lose documents silently: other processes, other files, sources that change, disks that fail."""

from __future__ import annotations

import errno
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_train.data.prepare import PrepareOptions
from moe_train.data.prepare.copying import join_ranges
from moe_train.data.prepare.part import Part, PartWriter
from moe_train.data.prepare.runs import Runs
from moe_train.data.prepare.work import perform
from moe_train.data.sources import SourceFile, find_sources
from tests.unit.data.prepare.conftest import contents, origins

Run = Callable[..., dict[str, dict[str, Any]]]
TextsOf = Callable[[Path], list[str]]

_TASK = """
import sys
from moe_train.data.prepare import How, PrepareOptions, prepare
from moe_train.data.sources import find_sources
from moe_train.data.tokenizers import SentencePieceTokenizer
source, prefix, model, task = sys.argv[1:]
prepare(find_sources([source]), prefix, SentencePieceTokenizer(model), PrepareOptions(),
        How(piece_bytes=3000, task=(int(task), 6)))
"""


def test_tasks_that_start_together(tmp_path: Path, run: Run, tokenizer, write_parquet, make_texts) -> None:
    """As an array of Slurm does."""
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 200), row_group_size=5)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", _TASK, source, tmp_path / "x", tokenizer.path, str(number)], env=environment
        )
        for number in range(1, 7)
    ]
    assert [task.wait() for task in tasks] == [0] * 6
    run([source], tmp_path / "x", merge_only=True, piece_bytes=3000)
    run([source], tmp_path / "whole/x")
    assert contents(tmp_path / "whole").items() <= contents(tmp_path).items()


def test_output_beside_its_sources(tmp_path: Path, run: Run, texts_of: TextsOf, write_parquet, make_texts) -> None:
    texts = make_texts(1, 50)
    write_parquet(tmp_path / "in.parquet", texts)
    for source in (tmp_path, f"{tmp_path}/*.parquet"):
        run([source], tmp_path / "x", task=(1, 2))
        run([source], tmp_path / "x")
        run([source], tmp_path / "x")
        assert texts_of(tmp_path / "x") == texts


def test_many_small_files_are_one_piece(tmp_path: Path, run: Run, texts_of: TextsOf, write_parquet) -> None:
    for number in range(30):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{number:02d}.txt").write_text(f"document {number}")
    (tmp_path / "in/10.txt").write_text("")
    write_parquet(tmp_path / "in/31.parquet", ["a", None, "b"])
    manifest = run([tmp_path / "in"], tmp_path / "x", piece_bytes=1 << 20, task=(2, 2))
    assert manifest == {}
    assert list(tmp_path.glob("x.work/0*.json")) == []  # the one piece is the first task's
    manifest = run([tmp_path / "in"], tmp_path / "x", piece_bytes=1 << 20)[""]
    assert texts_of(tmp_path / "x") == [f"document {n}" for n in range(30) if n != 10] + ["a", "b"]
    assert [(p["file"], p["row"], p["reason"]) for p in manifest["problems"]] == [
        ("10.txt", 0, "empty"),
        ("31.parquet", 1, "null"),
    ]
    assert [(row["source"], row["row"]) for row in origins(tmp_path / "x")][-3:] == [
        ("29.txt", 0),
        ("31.parquet", 0),
        ("31.parquet", 2),
    ]
    assert all(len(source["xxh3_128"]) == 32 for source in manifest["sources"])


@pytest.mark.parametrize("reason", ["null", "empty", "too long"])
def test_what_is_asked_to_stop_the_job(tmp_path: Path, run: Run, write_parquet, reason: str) -> None:
    texts = ["good", {"null": None, "empty": "", "too long": "x" * 50}[reason], "good"]
    source = write_parquet(tmp_path / "in.parquet", texts)
    with pytest.raises(ValueError, match=f"in.parquet, row 1: {reason}; --stop-on asks for this"):
        run([source], tmp_path / "x", PrepareOptions(stop_on=(reason,), max_chars=10))
    assert run([source], tmp_path / "x", PrepareOptions(max_chars=10))[""]["skipped"] == {reason: 1}


def test_a_source_that_changes_under_way(
    tmp_path: Path, run: Run, write_parquet, make_texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 100), row_group_size=10)

    def touching(*arguments: Any) -> Any:
        facts = os.stat(source)
        os.utime(source, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
        return perform(*arguments)

    monkeypatch.setattr("moe_train.data.prepare.executors.perform", touching)
    with pytest.raises(ValueError, match="in.parquet changed while it was read"):
        run([source], tmp_path / "x")


def test_a_source_that_was_copied_under_way_is_the_same(tmp_path: Path, run: Run, write_parquet, make_texts) -> None:
    for name in ("a", "b"):
        write_parquet(tmp_path / f"in/{name}.parquet", make_texts(1, 60), row_group_size=10)
    run([tmp_path / "in"], tmp_path / "x", piece_bytes=1 << 20, task=(1, 2))
    run([tmp_path / "in"], tmp_path / "y", piece_bytes=1000, task=(1, 1))
    os.utime(tmp_path / "in/a.parquet")
    run([tmp_path / "in"], tmp_path / "y", piece_bytes=1000)
    (tmp_path / "in/b.parquet").write_bytes(
        (tmp_path / "in/b.parquet").read_bytes()[:50] + b"?" + (tmp_path / "in/b.parquet").read_bytes()[51:]
    )
    with pytest.raises(ValueError, match="Different are sources"):
        run([tmp_path / "in"], tmp_path / "y", piece_bytes=1000)


def test_files_in_the_way(tmp_path: Path, run: Run, write_parquet, make_texts) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 60))
    (tmp_path / "x_text_document.bin").write_text("of another program")
    with pytest.raises(ValueError, match=r"x_text_document.bin is in the way \(1 such files\)"):
        run([source], tmp_path / "x")
    assert (tmp_path / "x_text_document.bin").read_text() == "of another program"
    run([source], tmp_path / "y", PrepareOptions(shard_tokens=300))
    (tmp_path / "y.manifest.json").unlink()
    with pytest.raises(ValueError, match="y.documents.parquet is in the way"):
        run([source], tmp_path / "y", PrepareOptions(shard_tokens=3000))
    run([source], tmp_path / "z")
    with pytest.raises(ValueError, match="options.validation_fraction: 0.0 there, 0.5 now"):
        run([source], tmp_path / "z", PrepareOptions(validation_fraction=0.5))


def test_a_first_mistake_is_forgiven(tmp_path: Path, run: Run, write_parquet, make_texts) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 30), part=["nowhere"] * 30)
    with pytest.raises(ValueError, match="no task has done anything for .* yet"):
        run([source], tmp_path / "x", merge_only=True)
    with pytest.raises(ValueError, match="names sides"):
        run([source], tmp_path / "x", PrepareOptions(split_from="part"))
    run([source], tmp_path / "x")


def test_names_that_are_misspelt(tmp_path: Path, run: Run, write_parquet) -> None:
    source = write_parquet(tmp_path / "in.parquet", ["text"])
    for option in ("split_column", "id_column", "domain_column"):
        with pytest.raises(ValueError, match="has no column urll"):
            run([source], tmp_path / "x", PrepareOptions(**{option: "urll"}))


class _Flaky(io.FileIO):
    """Fails the third time something is read from the middle on, and never again."""

    reads = 0

    def read(self, size: int = -1) -> bytes:
        type(self).reads += 1
        if type(self).reads == 12:
            raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")
        return super().read(size)


def test_a_network_that_fails_once_loses_no_row(
    tmp_path: Path, run: Run, texts_of: TextsOf, write_parquet, make_texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = make_texts(1, 300)
    source = write_parquet(tmp_path / "in.parquet", texts, row_group_size=50)
    monkeypatch.setattr(SourceFile, "is_local", False)
    monkeypatch.setattr(SourceFile, "open", lambda self: _Flaky(self.path))
    (file,) = find_sources([source])
    assert not file.is_local
    failures = 0
    for _ in range(20):
        try:
            manifest = run([source], tmp_path / "x", PrepareOptions(on_bad="skip"))[""]
        except (OSError, ValueError):
            failures += 1
            continue
        assert manifest["skipped"] == {} and texts_of(tmp_path / "x") == texts
        break
    assert failures == 1


@pytest.mark.parametrize("kernel", [True, False])
def test_copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool) -> None:
    """pitfalls row 34 (axolotl#2396, Megatron-DeepSpeed PR18): several ranges at a time give the file that one after
    the other gives. Speed is in benchmarks/prepare_scale.py."""
    if not kernel:

        def refuse(*_: Any) -> int:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    contents = [np.random.default_rng().bytes(size) for size in (3_000_000, 10, 1_500_000)]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    ranges = [(0, 10, 2_500_000), (1, 0, 10), (2, 5, 0), (0, 0, 10), (2, 1_000_000, 400_000), (0, 7, 2_000_000)]
    for workers in (1, 4):
        join_ranges([(tmp_path / str(n), start, count) for n, start, count in ranges], tmp_path / "all", workers)
        expected = b"".join(contents[n][start : start + count] for n, start, count in ranges)
        assert (tmp_path / "all").read_bytes() == expected
        with pytest.raises(ValueError, match="1 is shorter than its table says"):
            join_ranges([(tmp_path / "1", 9, 2)], tmp_path / "short", workers)


@pytest.mark.parametrize("function", ["writev", "copy_file_range"])
def test_a_full_disk(
    tmp_path: Path, run: Run, write_parquet, make_texts, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """While parts are written, and while they are merged."""
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 100), row_group_size=5)
    run([source], tmp_path / "expected/x")
    real, calls = getattr(os, function), iter(range(1000))

    def full(*args: Any) -> int:
        if next(calls) >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(real(*args))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(OSError, match="No space left on device: .*x.work .*free some space .* goes on") as caught:
            run([source], tmp_path / "out/x", task=(2, 2))
            run([source], tmp_path / "out/x")
    assert caught.value.errno == errno.ENOSPC
    assert not contents(tmp_path / "out")
    assert not list((tmp_path / "out/x.work").glob("*.partial"))
    run([source], tmp_path / "out/x")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_table_that_a_full_disk_does_not_end(tmp_path: Path) -> None:
    writer = PartWriter(Part(tmp_path, 0), 1, Runs(tmp_path, None))
    writer._table.close()

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer._table = SimpleNamespace(close=full)
    assert len(list(tmp_path.glob("*.partial"))) == 1
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_task_removes_what_dead_processes_of_its_machine_left(
    tmp_path: Path, run: Run, write_parquet, make_texts
) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 50), row_group_size=5)
    run([source], tmp_path / "out/x", task=(1, 2))
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    names = [f"000001.0.bin.{platform.node()}.{pid}.partial" for pid in (dead.stdout.strip(), os.getpid())]
    names.append("000001.0.bin.elsewhere.1.partial")
    for name in names:
        (tmp_path / "out/x.work" / name).touch()
    run([source], tmp_path / "out/x", task=(1, 2))
    assert sorted(p.name for p in (tmp_path / "out/x.work").glob("*.partial")) == sorted(names[1:])


def test_an_unfinished_job_of_an_earlier_version(tmp_path: Path, run: Run, write_parquet, make_texts) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 50), row_group_size=5)
    run([source], tmp_path / "out/x", task=(1, 1))
    folder = tmp_path / "out/x.work"
    job = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(json.dumps(job | {"format": 2}))
    (folder / "source-000000.json").write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(ValueError, match="unfinished job that differs; .* format: 2 there, 3 now"):
        run([source], tmp_path / "out/x")


@pytest.mark.parametrize("damage", ["cut", "zeros", "gone"])
@pytest.mark.parametrize("suffix", ["0.bin", "arrow"])
def test_a_part_that_did_not_reach_the_disk_is_done_again(
    tmp_path: Path, run: Run, write_parquet, make_texts, damage: str, suffix: str
) -> None:
    """As after a power failure: its facts are there, other files of it are not whole."""
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 100), row_group_size=5)
    run([source], tmp_path / "expected/x")
    for task in (1, 2):
        run([source], tmp_path / "out/x", task=(task, 2))
    (path,) = (tmp_path / "out/x.work").glob(f"000001.*{suffix}")
    size = path.stat().st_size
    path.unlink()
    if damage != "gone":
        path.write_bytes(b"\0" * (size // 2 if damage == "cut" else size))
    with pytest.raises(ValueError, match="[0-9]+ of [0-9]+ pieces are not done; run all tasks first"):
        run([source], tmp_path / "out/x", merge_only=True)
    run([source], tmp_path / "out/x", task=(2, 2))
    run([source], tmp_path / "out/x", merge_only=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
