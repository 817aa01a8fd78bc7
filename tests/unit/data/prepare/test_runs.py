"""Files that parts share, and that become shards without a copy."""

from __future__ import annotations

import errno
import os
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


@given(st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=6), st.none() | st.integers(1, 50))
def test_shards_are_filled_in_order(batches: list[list[int]], limit: int | None) -> None:
    """The same shards however the documents come, each with all that goes in."""
    shards: list[list[int]] = [[]]
    for lengths in batches:
        slices = list(fill_shards(np.cumsum(lengths, dtype=np.int64), sum(shards[-1]), limit))
        assert [n for begin, stop in slices for n in range(begin, stop)] == list(range(len(lengths)))
        for place, (begin, stop) in enumerate(slices):
            if place:
                shards.append([])
            shards[-1] += lengths[begin:stop]
    if limit is None:
        assert len(shards) == 1
        return
    for shard, following in zip(shards, [*shards[1:], None], strict=True):
        # Too large only by a single document with tokens.
        assert sum(shard) <= limit or sum(length > 0 for length in shard) == 1
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
                done.append((part, PartFacts(segments=runs.finish_part()), wanted))
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


def test_what_is_published_is_not_written_to_again(
    tmp_path: Path, run: Run, write_parquet, make_texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended before the manifest, with tokens under both names; then a part of them is found to be torn."""
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 100), row_group_size=5)
    run([source], tmp_path / "expected/x")
    real = os.replace

    def until_the_index(source: Any, target: Any) -> None:
        if str(target).endswith(".idx"):
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until_the_index)
        with pytest.raises(KeyboardInterrupt):
            run([source], tmp_path / "out/x")
    published = tmp_path / "out/x_text_document.bin"
    (shared,) = (tmp_path / "out/x.work").glob("*.bin")
    assert shared.samefile(published)
    before = published.read_bytes()
    (tmp_path / "out/x.work/000000.arrow").write_bytes(b"torn")
    with monkeypatch.context() as patch:
        patch.setattr("moe_train.data.prepare.run.merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run([source], tmp_path / "out/x")
    assert published.read_bytes() == before
    run([source], tmp_path / "out/x")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
