"""What a preparation writes, and what it refuses."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset as UpstreamDataset

from moe_train.data.indexed import IndexedDataset
from moe_train.data.manifest import read_manifest, read_token_bytes, tokenizer_of
from moe_train.data.prepare import PrepareOptions
from moe_train.data.prepare import merge as merge_module
from moe_train.data.prepare.choice import sides
from moe_train.data.sources import Rows
from moe_train.data.tokenizers import Tokenizer
from tests.unit.data.prepare.conftest import contents, origins, side

HALF = PrepareOptions(validation_fraction=0.5)
SUFFIXES = ("_text_document.bin", "_text_document.idx", ".documents.parquet", ".token_bytes.npy", ".manifest.json")

Run = Callable[..., dict[str, dict[str, Any]]]
TextsOf = Callable[[Path], list[str]]


def test_each_document_once_and_in_order(
    tmp_path: Path, run: Run, texts_of: TextsOf, write_parquet, make_texts
) -> None:
    """pitfalls row 31 (Nemotron#260, PR272): the parts are disjoint and together the multiset of documents."""
    everything: list[str] = []
    for index, name in enumerate(["b.parquet", "a.parquet", "sub/c.parquet"]):
        texts = make_texts(index, 50)
        texts[10] = texts[20]  # a document may occur twice
        everything += texts
        write_parquet(tmp_path / "in" / name, texts, row_group_size=[3, 7, 1000][index])
    run([tmp_path / "in"], tmp_path / "out/x", PrepareOptions(validation_fraction=0.3, test_fraction=0.3))
    stems = {split: tmp_path / f"out/x_{split}" for split in ("train", "validation", "test")}
    parts = {split: texts_of(stem) for split, stem in stems.items()}
    assert Counter(sum(parts.values(), [])) == Counter(everything)
    table = {split: origins(stem) for split, stem in stems.items()}
    places = [(row["source"], row["row"]) for split in parts for row in table[split]]
    assert len(places) == len(set(places)) == len(everything)
    for split in parts:
        assert len(parts[split]) > 20
        order = [(row["source"], row["row"]) for row in table[split]]
        assert order == sorted(order)
        for row, text in zip(table[split], parts[split], strict=True):
            source = pq.read_table(tmp_path / "in" / row["source"]).slice(row["row"], 1).to_pylist()[0]
            assert (source["text"], source["id"], source["dump"]) == (text, row["id"], row["domain"])


def test_the_bytes_are_megatrons(tmp_path: Path, run: Run, tokenizer: Tokenizer, write_parquet, make_texts) -> None:
    texts = make_texts(4, 80)
    run([write_parquet(tmp_path / "in.parquet", texts)], tmp_path / "ours")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for ids in tokenizer.encode_batch(texts):
        builder.add_document(np.append(ids, tokenizer.eod_id), [len(ids) + 1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        ours = (tmp_path / f"ours_text_document.{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs.{suffix}").read_bytes()
    read = UpstreamDataset(str(tmp_path / "ours_text_document"))
    assert [tokenizer.decode(read[i]) for i in range(len(read))] == texts


def test_manifest_and_tables(
    tmp_path: Path, run: Run, texts_of: TextsOf, tokenizer: Tokenizer, write_parquet, make_texts
) -> None:
    texts = make_texts(1, 60)
    texts[3:6] = [None, "", None]
    dumps = [["code", "law"][i % 2] for i in range(60)]
    source = write_parquet(tmp_path / "in.parquet", texts, dump=dumps)
    returned = run([source], tmp_path / "out/", HALF)
    returned = run([source], f"{tmp_path}/out/", HALF)
    sizes = tokenizer.token_bytes()
    total = 0
    for split in ("train", "validation"):
        stem = tmp_path / "out" / split
        manifest = read_manifest(stem)
        assert manifest == returned[split]
        dataset = IndexedDataset(f"{stem}_text_document")
        assert manifest["skipped"] == {"null": 2, "empty": 1}
        assert manifest["documents"] == len(dataset) and manifest["tokens"] == dataset.token_count
        assert manifest["text_bytes"] == sum(len(text.encode()) for text in texts_of(stem))
        assert read_token_bytes(stem).tolist() == sizes.tolist()
        assert read_token_bytes(stem)[dataset.tokens].sum() == manifest["text_bytes"]
        assert manifest["tokenizer"]["checksum"] == tokenizer.checksum
        assert tokenizer_of(stem).checksum == tokenizer.checksum
        assert [one["name"] for one in manifest["sources"]] == ["in.parquet"]
        assert manifest["sources"][0]["size"] == source.stat().st_size
        assert len(manifest["sources"][0]["xxh3_128"]) == 32
        lengths: Counter[str] = Counter()
        for row, ids in zip(origins(stem), (dataset.document(i) for i in range(len(dataset))), strict=True):
            lengths[row["domain"]] += len(ids)
        assert {name: counts["tokens"] for name, counts in manifest["domains"].items()} == dict(lengths)
        total += len(dataset)
    assert total == 57


def test_rows_with_the_same_split_value_stay_together(tmp_path: Path, run: Run, write_parquet, make_texts) -> None:
    urls = [f"group {i % 20}" for i in range(200)]
    run([write_parquet(tmp_path / "in.parquet", make_texts(1, 200), url=urls)], tmp_path / "x", HALF)
    sides = {split: {urls[row["row"]] for row in origins(tmp_path / f"x_{split}")} for split in ("train", "validation")}
    assert not sides["train"] & sides["validation"] and all(sides.values())
    assert sides["validation"] == {url for url in urls if side(url, HALF) == "validation"}


def test_a_column_may_name_the_side(tmp_path: Path, run: Run, texts_of: TextsOf, write_parquet, make_texts) -> None:
    texts = make_texts(1, 30)
    wanted = ["train", "test", "validation"] * 10
    source = write_parquet(tmp_path / "in.parquet", texts, part=wanted)
    run([source], tmp_path / "x", PrepareOptions(split_from="part"))
    for place, split in enumerate(["train", "test", "validation"]):
        assert texts_of(tmp_path / f"x_{split}") == texts[place::3]
    with pytest.raises(ValueError, match="names sides train, validation, test; found one"):
        run([source], tmp_path / "y", PrepareOptions(split_from="dump"))


def test_nothing_but_the_text(tmp_path: Path, run: Run, texts_of: TextsOf, write_parquet, make_texts) -> None:
    texts = make_texts(1, 40)
    source = write_parquet(tmp_path / "in.parquet", texts, id=[], url=[None] * 40, dump=[])
    run([source], tmp_path / "x", HALF)
    both = texts_of(tmp_path / "x_train") + texts_of(tmp_path / "x_validation")
    assert Counter(both) == Counter(texts)
    assert set(texts_of(tmp_path / "x_validation")) == {text for text in texts if side(text, HALF) == "validation"}
    rows = origins(tmp_path / "x_train") + origins(tmp_path / "x_validation")
    assert {(row["id"], row["domain"]) for row in rows} == {(None, "")}


def test_no_split_by_default(tmp_path: Path, run: Run, texts_of: TextsOf, write_parquet, make_texts) -> None:
    texts = make_texts(1, 30)
    manifests = run([write_parquet(tmp_path / "in.parquet", texts)], tmp_path / "out/x")
    assert list(manifests) == [""] and texts_of(tmp_path / "out/x") == texts
    assert set(contents(tmp_path / "out")) == {f"x{suffix}" for suffix in SUFFIXES} | {"tokenizer.model"}
    with pytest.raises(ValueError, match="is a folder: name the files in it"):
        run([tmp_path / "in.parquet"], f"{tmp_path}/out/")


def test_shards_are_the_same_stream(tmp_path: Path, run: Run, write_parquet, make_texts) -> None:
    """pitfalls rows 31 and 35 (M#452): several files in place of one."""
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 120))
    run([source], tmp_path / "one", HALF)
    whole = IndexedDataset(tmp_path / "one_train_text_document")
    for limit in (1, 500, 10**9):
        stem = tmp_path / f"limit{limit}_train"
        manifest = run(
            [source], tmp_path / f"limit{limit}", PrepareOptions(validation_fraction=0.5, shard_tokens=limit)
        )
        shards = [IndexedDataset(f"{stem}_{i:05d}_text_document") for i in range(len(manifest["train"]["shards"]))]
        assert not Path(f"{stem}_{len(shards):05d}_text_document.idx").exists()
        assert np.concatenate([shard.tokens for shard in shards]).tolist() == whole.tokens.tolist()
        assert np.concatenate([s.sequence_lengths for s in shards]).tolist() == whole.sequence_lengths.tolist()
        assert [(len(s), s.token_count) for s in shards] == [
            (s["documents"], s["tokens"]) for s in manifest["train"]["shards"]
        ]
        for shard, following in zip(shards, shards[1:], strict=False):
            assert shard.token_count <= limit or len(shard) == 1
            assert shard.token_count + len(following.document(0)) > limit
        assert len(shards) == {1: len(whole), 10**9: 1}.get(limit, len(shards)) > 0
        assert origins(stem) == origins(tmp_path / "one_train")


def test_a_finished_job_is_left_alone_and_another_is_refused(
    tmp_path: Path, run: Run, write_parquet, make_texts
) -> None:
    texts = make_texts(1, 60)
    source = write_parquet(tmp_path / "in.parquet", texts)
    first = run([source], tmp_path / "out/x", HALF)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run([source], tmp_path / "out/x", HALF) == first
    assert run([tmp_path / "in.parq*"], tmp_path / "out/x", HALF, workers=2, piece_bytes=10) == first
    with pytest.raises(ValueError, match=r"options.split_seed: 0 there, 4 now"):
        run([source], tmp_path / "out/x", PrepareOptions(validation_fraction=0.5, split_seed=4))
    same = source.read_bytes()
    source.unlink()
    source.write_bytes(same)  # as copied from elsewhere: another time, the same content
    assert run([source], tmp_path / "out/x", HALF) == first
    write_parquet(source, [*texts, "one more"])
    with pytest.raises(ValueError, match="Different are sources"):
        run([source], tmp_path / "out/x", HALF)
    content = bytearray(same)
    content[50] ^= 1
    source.write_bytes(content)  # the same size
    with pytest.raises(ValueError, match="Different are sources"):
        run([source], tmp_path / "out/x", HALF)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_damaged_result_is_written_again(tmp_path: Path, run: Run, write_parquet, make_texts) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 60))
    run([source], tmp_path / "out/x", HALF)
    whole = contents(tmp_path / "out")
    (tmp_path / "out/x_train_text_document.bin").write_bytes(whole["x_train_text_document.bin"][:-2])
    (tmp_path / "out/x_validation.token_bytes.npy").unlink()
    run([source], tmp_path / "out/x", HALF)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("renames", range(10))
def test_a_crash_while_publishing_leaves_no_half_data_set(
    tmp_path: Path, run: Run, write_parquet, make_texts, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 60))
    run([source], tmp_path / "whole/x", HALF)

    class Crash(Exception):
        pass

    def crashing_publish(paths: list[Path]) -> None:
        from moe_train.data.files import publish

        assert len(paths) == 10
        publish(paths[:renames])
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "publish", crashing_publish)
        with pytest.raises(Crash):
            run([source], tmp_path / "out/x", HALF)
    whole = contents(tmp_path / "whole")
    found = contents(tmp_path / "out")
    assert found.items() <= whole.items()
    if any(name.endswith(".idx") for name in found):
        others = {f"x_{s}{x}" for s in ("train", "validation") for x in SUFFIXES if x.split(".")[-1] in ("bin", "npy")}
        assert others <= set(found)
    if any(name.endswith(".manifest.json") for name in found):
        assert {f"x_{split}_text_document.idx" for split in ("train", "validation")} <= set(found)
    run([source], tmp_path / "out/x", HALF)
    assert contents(tmp_path / "out") == whole
    assert not (tmp_path / "out/x.work").exists()


def test_bad_input(tmp_path: Path, run: Run, write_parquet, make_texts) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 30))
    out = tmp_path / "out/x"
    with pytest.raises(ValueError, match="in.parquet has no column body; it has text, id, url, dump"):
        run([source], out, PrepareOptions(text_column="body"))
    with pytest.raises(ValueError, match="has no column language_score"):
        run([source], out, PrepareOptions(min_language_score=0.5))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        run([tmp_path / "nowhere"], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no file that ends in .parquet"):
        run([tmp_path / "empty"], out)
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(ValueError, match="notes.md is of no known kind"):
        run([tmp_path / "notes.md"], out)
    (tmp_path / "bad.parquet").write_text("text")
    with pytest.raises(ValueError, match="bad.parquet is not a parquet file"):
        run([tmp_path / "bad.parquet"], out)
    blank = write_parquet(tmp_path / "blank.parquet", [None, "", ""])
    with pytest.raises(ValueError, match="no document fell to train .left out: 2 empty, 1 null"):
        run([blank], out, HALF)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "validation fraction must be at least 0 and below 1"),
        ({"validation_fraction": 0.6, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"split_from": "side", "test_fraction": 0.5}, "not from both"),
        ({"sample": 0.0}, "above 0 and at most 1"),
        ({"max_tokens": 0}, "max tokens must be at least 1"),
        ({"min_chars": 5, "max_chars": 4}, "at least 5 and at most 4"),
        ({"url_include": "("}, "no regular expression"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareOptions(**options)


def test_another_tokenizer_in_the_folder_is_not_overwritten(
    tmp_path: Path, run: Run, write_parquet, make_texts
) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 30))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tokenizer.model").write_bytes(b"of somebody else")
    with pytest.raises(ValueError, match="is another tokenizer"):
        run([source], tmp_path / "out/x", HALF)
    assert contents(tmp_path / "out") == {"tokenizer.model": b"of somebody else"}


def test_facts_of_a_generated_corpus_are_kept(tmp_path: Path, run: Run, write_parquet, make_texts) -> None:
    source = write_parquet(tmp_path / "in/stdlib.parquet", make_texts(1, 30))
    facts = {"content_sha256": "abc", "python": "3.11.0"}
    source.with_suffix(".json").write_text(json.dumps(facts))
    manifests = run([source], tmp_path / "x", HALF)
    assert manifests["validation"]["corpora"] == {"stdlib.parquet": facts}


def test_manifest_files_that_are_damaged(tmp_path: Path, run: Run, write_parquet, make_texts) -> None:
    run([write_parquet(tmp_path / "in.parquet", make_texts(1, 30))], tmp_path / "x")
    stem = tmp_path / "x"
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match="tokenizer.model"):
        tokenizer_of(stem)
    (tmp_path / "x.token_bytes.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="token_bytes.npy is damaged"):
        read_token_bytes(stem)
    (tmp_path / "x.manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        read_manifest(stem)
    with pytest.raises(FileNotFoundError, match="written by prepare"):
        read_manifest(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="bits per byte"):
        read_token_bytes(tmp_path / "other")


def test_split_fraction_and_seed() -> None:
    count = 20_000
    keys = pa.array([f"https://example.org/{i}" for i in range(count)], pa.large_string())
    for fraction in (0.01, 0.3):
        sides_of_seeds = []
        for seed in range(2):
            options = PrepareOptions(validation_fraction=fraction, test_fraction=0.2, split_seed=seed)
            found = sides(Rows(0, count, {"url": keys}), keys, np.arange(count), options)
            for split, share in (("validation", fraction), ("test", 0.2)):
                got = float((found == options.splits.index(split)).mean())
                assert abs(got - share) < 5 * math.sqrt(share / count)
            assert side(keys[7].as_py(), options) == options.splits[found[7]]
            sides_of_seeds.append(found.tolist())
        assert sides_of_seeds[0] != sides_of_seeds[1]
