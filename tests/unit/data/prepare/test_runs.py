"""Files that parts share, and that become shards without a copy."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.data.prepare import PrepareOptions
from moe_train.data.prepare.part import Part, PartFacts
from moe_train.data.prepare.runs import Runs, fill_shards
from tests.unit.data.prepare.conftest import contents

Run = Callable[..., dict[str, dict[str, Any]]]

IN_SHARDS = PrepareOptions(validation_fraction=0.2, shard_tokens=700)


def filled(batches: list[list[int]], limit: int | None) -> list[list[int]]:
    """Lengths of the documents of each shard."""
    shards: list[list[int]] = [[]]
    for lengths in batches:
        begun = sum(shards[-1]) if shards[-1] else None
        slices = list(fill_shards(np.cumsum(lengths, dtype=np.int64), begun, limit))
        assert [n for begin, stop in slices for n in range(begin, stop)] == list(range(len(lengths)))
        for place, (begin, stop) in enumerate(slices):
            if place:
                shards.append([])
            shards[-1] += lengths[begin:stop]
    return shards


@given(st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=6), st.none() | st.integers(1, 50))
def test_shards_are_filled_in_order(batches: list[list[int]], limit: int | None) -> None:
    """The same shards however the documents come, each with all that goes in."""
    shards = filled(batches, limit)
    assert shards == filled([[length for lengths in batches for length in lengths]], limit)
    if limit is None:
        assert len(shards) == 1
        return
    for shard, following in zip(shards, [*shards[1:], None], strict=True):
        assert sum(shard) <= limit or shard[0] > limit and not any(shard[1:])
        assert following is None or sum(shard) + following[0] > limit


@given(st.data())
def test_values_are_where_segments_say(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Parts one after the other, some given up; files begin anew where shards end."""
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    limit = data.draw(st.none() | st.integers(1, 60))
    done: list[tuple[Part, PartFacts, list[dict[str, bytes]]]] = []
    with closing(Runs(folder, limit)) as runs:
        for number in range(data.draw(st.integers(1, 5))):
            part, wanted = Part(folder, number), [{"bin": b"", "loss": b""} for _ in range(2)]
            for _ in range(data.draw(st.integers(0, 3))):
                lengths_D = random.integers(0, 20, data.draw(st.integers(0, 6)))
                ends_D, splits_D = np.cumsum(lengths_D), random.integers(0, 2, len(lengths_D))
                count = int(lengths_D.sum())
                streams = {
                    "bin": random.integers(0, 1 << 16, count, np.uint16),
                    "loss": random.integers(0, 2, count, np.uint8),
                }
                for split in range(2):
                    runs.write(f"{number:06d}", split, streams, ends_D, splits_D == split)
                    own = np.repeat(splits_D == split, lengths_D)
                    for stream, values in streams.items():
                        wanted[split][stream] += values[own].tobytes()
            if data.draw(st.booleans()):
                done.append((part, PartFacts(segments=runs.segments()), wanted))
                runs.keep_part()
            else:
                runs.discard_part()
    assert not list(folder.glob("*.partial"))
    for part, facts, wanted in done:
        for split, streams in enumerate(wanted):
            for stream, content in streams.items():
                start = data.draw(st.integers(0, len(content)))
                found = b""
                for path, first, count in part.ranges(facts, split, stream, start, len(content) - start):
                    found += path.read_bytes()[first : first + count]
                assert found == content[start:]
    kept = sum(len(content) for _, _, wanted in done for streams in wanted for content in streams.values())
    assert sum(path.stat().st_size for path in folder.iterdir()) == kept, "nothing stays of what was given up"


@pytest.mark.parametrize("options", [PrepareOptions(), IN_SHARDS])
def test_one_worker_writes_each_token_once(
    tmp_path: Path, run: Run, write_parquet, make_texts, monkeypatch: pytest.MonkeyPatch, options: PrepareOptions
) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 200), row_group_size=5)
    run([source], tmp_path / "expected/x", options, workers=2)
    copy: dict[str, Any] = {"name": os.copy_file_range, "calls": 0}

    def counted(*arguments: Any) -> int:
        copy["calls"] += 1
        return int(copy["name"](*arguments))

    monkeypatch.setattr(os, "copy_file_range", counted)
    manifests = run([source], tmp_path / "out/x", options)
    assert not copy["calls"]
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert all(len(manifest["shards"]) > 2 or options is not IN_SHARDS for manifest in manifests.values())
    run([source], tmp_path / "two/x", options, task=(1, 2))
    run([source], tmp_path / "two/x", options)
    assert copy["calls"] and contents(tmp_path / "two") == contents(tmp_path / "expected")


def test_a_file_system_without_links(
    tmp_path: Path, run: Run, write_parquet, make_texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 100), row_group_size=5)
    run([source], tmp_path / "expected/x", IN_SHARDS)

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    run([source], tmp_path / "out/x", IN_SHARDS)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("published", [False, True])
def test_names_of_one_file_that_a_killed_merge_left(
    tmp_path: Path, run: Run, write_parquet, make_texts, monkeypatch: pytest.MonkeyPatch, published: bool
) -> None:
    """Killed with the tokens under two names, or three; then a part is found to be torn, so that they are copied."""
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 100), row_group_size=5)
    run([source], tmp_path / "expected/x")
    real = os.replace

    def until_the_index(source: Any, target: Any) -> None:
        if str(target).endswith(".idx" if published else ".bin") and Path(target).parent.name == "out":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until_the_index)
        with pytest.raises(KeyboardInterrupt):
            run([source], tmp_path / "out/x")
    (shared,) = (tmp_path / "out/x.work").glob("*.bin")
    tokens = tmp_path / "out/x_text_document.bin"
    assert tokens.exists() == published
    # A process that is killed does not tidy up.
    os.link(shared, f"{tokens}.partial")
    before = shared.read_bytes()
    (tmp_path / "out/x.work/000000.arrow").write_bytes(b"torn")
    with monkeypatch.context() as patch:
        patch.setattr("moe_train.data.prepare.merge.publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run([source], tmp_path / "out/x")
    assert shared.read_bytes() == before
    assert not published or tokens.read_bytes() == before
    run([source], tmp_path / "out/x")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_finished_result_has_one_name(tmp_path: Path, run: Run, write_parquet, make_texts) -> None:
    """Killed between the tokens' renaming and the manifest's; renaming one name of a file to another does nothing."""
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 100))
    run([source], tmp_path / "out/x", task=(1, 1))
    (shared,) = (tmp_path / "out/x.work").glob("*.bin")
    os.link(shared, tmp_path / "out/x_text_document.bin")
    run([source], tmp_path / "out/x", merge_only=True)
    assert not list((tmp_path / "out").glob("*.partial"))
    assert (tmp_path / "out/x_text_document.bin").stat().st_nlink == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_more_shards_in_a_piece_than_files_may_be_open(tmp_path: Path, run: Run, make_texts, workers: int) -> None:
    with gzip.open(tmp_path / "in.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in make_texts(1, 600))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        manifest = run([tmp_path / "in.jsonl.gz"], tmp_path / "x", PrepareOptions(shard_tokens=50), workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(manifest[""]["shards"]) > 200


@pytest.mark.parametrize("options", [PrepareOptions(), PrepareOptions(max_documents=55)])
def test_attempts_that_fail_do_not_fill_the_disk(
    tmp_path: Path, run: Run, write_parquet, make_texts, monkeypatch: pytest.MonkeyPatch, options: PrepareOptions
) -> None:
    """Facts that cannot be written, and merges that fail, time and again."""
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 100), row_group_size=5)
    sizes = set()
    for place in ("moe_train.data.prepare.part.write_atomically", "moe_train.data.prepare.merge.publish"):
        for _ in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(place, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
                with pytest.raises(OSError, match="No space left"):
                    run([source], tmp_path / "out/x", options)
            if "publish" in place:
                sizes.add(sum(path.stat().st_size for path in (tmp_path / "out/x.work").iterdir()))
            else:
                assert not list((tmp_path / "out/x.work").glob("*.bin*"))
    assert len(sizes) == 1
