from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from moe_train.data import prepare as prepare_module
from moe_train.data import sources
from moe_train.data.domains import Domains
from moe_train.data.indexed import IndexedDataset
from moe_train.data.manifest import read_manifest, read_token_bytes, tokenizer_of
from moe_train.data.prepare import PrepareOptions, is_validation, prepare

HALF = PrepareOptions(validation_fraction=0.5)
SUFFIXES = ("bin", "idx", "documents.parquet", "token_bytes.npy", "manifest.json")


def documents(prefix: Path) -> list[str]:
    dataset, tokenizer = IndexedDataset(prefix), tokenizer_of(prefix)
    dataset.verify()
    texts = []
    for index in range(len(dataset)):
        ids = dataset.document(index)
        assert ids[-1] == tokenizer.eod_id and tokenizer.eod_id not in ids[:-1]
        texts.append(tokenizer.decode(ids))
    return texts


def origins(prefix: Path) -> list[dict]:
    return pq.read_table(f"{prefix}.documents.parquet").to_pylist()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_each_document_once_and_in_order(tmp_path: Path, tokenizer, write_parquet, make_texts) -> None:
    """pitfalls row 31 (Nemotron#260, PR272): the parts are disjoint and together the multiset of documents."""
    everything: list[str] = []
    for index, name in enumerate(["b.parquet", "a.parquet", "sub/c.parquet"]):
        texts = make_texts(index, 50)
        texts[10] = texts[20]  # a document may occur twice
        everything += texts
        write_parquet(tmp_path / "in" / name, texts, row_group_size=[3, 7, 1000][index])
    prepare([tmp_path / "in"], tmp_path / "out", tokenizer, HALF)
    parts = {split: documents(tmp_path / "out" / split) for split in ("train", "validation")}
    assert Counter(parts["train"] + parts["validation"]) == Counter(everything)
    table = {split: origins(tmp_path / "out" / split) for split in parts}
    places = [{(row["source"], row["row"]) for row in table[split]} for split in parts]
    assert not places[0] & places[1] and len(places[0] | places[1]) == len(everything)
    for split in parts:
        assert len(parts[split]) > 40
        assert [(row["source"], row["row"]) for row in table[split]] == sorted(
            (row["source"], row["row"]) for row in table[split]
        )
        for row, text in zip(table[split], parts[split], strict=True):
            source = pq.read_table(tmp_path / "in" / row["source"]).slice(row["row"], 1).to_pylist()[0]
            assert (source["text"], source["id"], source["dump"]) == (text, row["id"], row["domain"])


def test_manifest_and_tables(tmp_path: Path, tokenizer, write_parquet, make_texts) -> None:
    texts = make_texts(1, 60)
    texts[3:6] = [None, "", None]
    dumps = [["code", "law"][i % 2] for i in range(60)]
    source = write_parquet(tmp_path / "in.parquet", texts, dump=dumps)
    returned = prepare([source], tmp_path / "out", tokenizer, HALF)
    sizes = tokenizer.token_bytes()
    total = 0
    for split in ("train", "validation"):
        prefix = tmp_path / "out" / split
        manifest = read_manifest(prefix)
        assert manifest == returned[split]
        dataset = IndexedDataset(prefix)
        assert manifest["skipped"] == {"null": 2, "empty": 1}
        assert manifest["documents"] == len(dataset) and manifest["tokens"] == dataset.token_count
        assert manifest["text_bytes"] == sum(len(text.encode()) for text in documents(prefix))
        assert manifest["inexact_documents"] == 0
        assert read_token_bytes(prefix).tolist() == sizes.tolist()
        assert read_token_bytes(prefix)[dataset.tokens].sum() == manifest["text_bytes"]
        counts = Counter(dataset.tokens.tolist())
        shares = [count / dataset.token_count for count in counts.values()]
        assert math.isclose(manifest["unigram_entropy_nats"], -sum(p * math.log(p) for p in shares), rel_tol=1e-12)
        assert manifest["tokenizer"]["checksum"] == tokenizer.checksum
        assert [one["name"] for one in manifest["sources"]] == ["in.parquet"]
        assert manifest["sources"][0]["size"] == source.stat().st_size
        domains = Domains(dataset)
        codes = np.bincount(domains.of_tokens(0, dataset.token_count), minlength=2)
        assert {n: c["tokens"] for n, c in manifest["domains"].items()} == dict(zip(domains.names, codes, strict=True))
        total += len(dataset)
    assert total == 57


def test_rows_with_the_same_split_value_stay_together(tmp_path: Path, tokenizer, write_parquet, make_texts) -> None:
    urls = [f"group {i % 20}" for i in range(200)]
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 200), url=urls)
    prepare([source], tmp_path / "out", tokenizer, HALF)
    sides = {
        split: {urls[row["row"]] for row in origins(tmp_path / "out" / split)} for split in ("train", "validation")
    }
    assert not sides["train"] & sides["validation"] and all(sides.values())
    assert sides["validation"] == {url for url in urls if is_validation(url, HALF)}


def test_split_fraction_and_seed() -> None:
    keys = [f"https://example.org/{i}" for i in range(20_000)]
    for fraction in (0.01, 0.3):
        sides = [
            {key for key in keys if is_validation(key, PrepareOptions(validation_fraction=fraction, split_seed=seed))}
            for seed in range(2)
        ]
        for side in sides:
            assert abs(len(side) / len(keys) - fraction) < 5 * math.sqrt(fraction / len(keys))
        assert sides[0] != sides[1]


def test_missing_optional_columns_and_nulls(tmp_path: Path, tokenizer, write_parquet, make_texts) -> None:
    texts = make_texts(1, 40)
    source = write_parquet(tmp_path / "in.parquet", texts, id=[None] * 40, url=[None] * 40, dump=[])
    prepare([source], tmp_path / "out", tokenizer, HALF)
    rows = origins(tmp_path / "out/train") + origins(tmp_path / "out/validation")
    assert {row["id"] for row in rows} == {f"in.parquet:{i}" for i in range(40)}
    assert {row["domain"] for row in rows} == {""}


def test_without_validation(tmp_path: Path, tokenizer, write_parquet, make_texts) -> None:
    texts = make_texts(1, 30)
    source = write_parquet(tmp_path / "in.parquet", texts)
    manifests = prepare([source], tmp_path / "out", tokenizer, PrepareOptions(validation_fraction=0.0))
    assert list(manifests) == ["train"] and documents(tmp_path / "out/train") == texts
    assert set(contents(tmp_path / "out")) == {f"train.{suffix}" for suffix in SUFFIXES} | {"tokenizer.model"}


def test_result_does_not_depend_on_how_rows_are_read(
    tmp_path: Path, tokenizer, write_parquet, make_texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 100), row_group_size=13)
    prepare([source], tmp_path / "a", tokenizer, HALF)
    monkeypatch.setattr("moe_train.data.sources.parquet.ROWS_PER_BATCH", 3)
    prepare([source], tmp_path / "b", tokenizer, HALF)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert len(a) == 11 and a == b


def test_a_finished_job_is_left_alone_and_another_is_refused(
    tmp_path: Path, tokenizer, write_parquet, make_texts
) -> None:
    texts = make_texts(1, 60)
    source = write_parquet(tmp_path / "in.parquet", texts)
    first = prepare([source], tmp_path / "out", tokenizer, HALF)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert prepare([source], tmp_path / "out", tokenizer, HALF) == first
    assert prepare([tmp_path / "in.parq*"], tmp_path / "out", tokenizer, HALF) == first
    with pytest.raises(ValueError, match='"split_seed": 0.*there.*"split_seed": 4.*now'):
        prepare([source], tmp_path / "out", tokenizer, PrepareOptions(validation_fraction=0.5, split_seed=4))
    with pytest.raises(ValueError, match="Different are options"):
        prepare([source], tmp_path / "out", tokenizer, PrepareOptions(validation_fraction=0.0))
    write_parquet(source, [*texts, "one more"])
    with pytest.raises(ValueError, match="Different are sources"):
        prepare([source], tmp_path / "out", tokenizer, HALF)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_damaged_result_is_written_again(tmp_path: Path, tokenizer, write_parquet, make_texts) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 60))
    prepare([source], tmp_path / "out", tokenizer, HALF)
    whole = contents(tmp_path / "out")
    (tmp_path / "out/train.bin").write_bytes(whole["train.bin"][:-2])
    (tmp_path / "out/validation.token_bytes.npy").unlink()
    prepare([source], tmp_path / "out", tokenizer, HALF)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("renames", range(10))
def test_a_crash_while_publishing_leaves_no_half_data_set(
    tmp_path: Path, tokenizer, write_parquet, make_texts, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 60))
    prepare([source], tmp_path / "whole", tokenizer, HALF)

    class Crash(Exception):
        pass

    def crashing_publish(paths: list[Path]) -> None:
        from moe_train.data.files import publish

        assert len(paths) == 10
        publish(paths[:renames])
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "publish", crashing_publish)
        with pytest.raises(Crash):
            prepare([source], tmp_path / "out", tokenizer, HALF)
    whole = contents(tmp_path / "whole")
    found = contents(tmp_path / "out")
    assert found.items() <= whole.items()
    if any(name.endswith(".idx") for name in found):
        others = {f"{split}.{suffix}" for split in ("train", "validation") for suffix in SUFFIXES if suffix != "idx"}
        assert others <= set(found)
    prepare([source], tmp_path / "out", tokenizer, HALF)
    assert contents(tmp_path / "out") == whole


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, tokenizer, write_parquet, make_texts) -> None:
    write_parquet(tmp_path / "in/a.parquet", make_texts(1, 60))
    bad = write_parquet(tmp_path / "in/b.parquet", make_texts(2, 600), row_group_size=20)
    content = bytearray(bad.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.parquet cannot be read as parquet behind row \d+"):
        prepare([tmp_path / "in"], tmp_path / "out", tokenizer, HALF)
    assert contents(tmp_path / "out") == {}


def test_bad_input(tmp_path: Path, tokenizer, write_parquet, make_texts) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 30), url=[])
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="in.parquet has no column url; it has text, id, dump"):
        prepare([source], out, tokenizer)
    by_id = PrepareOptions(split_column="id", validation_fraction=0.5)
    with pytest.raises(ValueError, match="no column body"):
        prepare([source], out, tokenizer, PrepareOptions(text_column="body", split_column="id"))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        prepare([tmp_path / "nowhere"], out, tokenizer, by_id)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no file that ends in .parquet"):
        prepare([tmp_path / "empty"], out, tokenizer, by_id)
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(ValueError, match="notes.md is of no known kind"):
        prepare([tmp_path / "notes.md"], out, tokenizer, by_id)
    (tmp_path / "bad.parquet").write_text("text")
    with pytest.raises(ValueError, match="bad.parquet is not a parquet file"):
        prepare([tmp_path / "bad.parquet"], out, tokenizer, by_id)
    with pytest.raises(ValueError, match="validation fraction"):
        prepare([source], out, tokenizer, PrepareOptions(validation_fraction=1.0))
    blank = write_parquet(tmp_path / "blank.parquet", [None, "", ""])
    with pytest.raises(ValueError, match="no document fell to train .skipped: 1 null, 2 empty"):
        prepare([blank], out, tokenizer, by_id)
    assert not out.exists() or contents(out) == {}


def test_another_tokenizer_in_the_folder_is_not_overwritten(
    tmp_path: Path, tokenizer, write_parquet, make_texts
) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 30))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tokenizer.model").write_bytes(b"of somebody else")
    with pytest.raises(ValueError, match="is another tokenizer"):
        prepare([source], tmp_path / "out", tokenizer, HALF)
    assert contents(tmp_path / "out") == {"tokenizer.model": b"of somebody else"}


def test_facts_of_a_generated_corpus_are_kept(tmp_path: Path, tokenizer, write_parquet, make_texts) -> None:
    source = write_parquet(tmp_path / "in/stdlib.parquet", make_texts(1, 30))
    facts = {"content_sha256": "abc", "python": "3.11.0"}
    source.with_suffix(".json").write_text(json.dumps(facts))
    manifests = prepare([source], tmp_path / "out", tokenizer, HALF)
    assert manifests["validation"]["corpora"] == {"stdlib.parquet": facts}


def test_sources_are_found_once_and_sampled_evenly(tmp_path: Path, write_parquet) -> None:
    for name in ("x/b", "x/a", "y/c"):
        write_parquet(tmp_path / f"{name}.parquet", [f"{name} {i:06d} " + "z" * 90 for i in range(500)])
    files = sources.find_sources([tmp_path, tmp_path / "x/a.parquet", str(tmp_path / "*/b.parquet")])
    assert [file.name for file in files] == ["x/a.parquet", "x/b.parquet", "y/c.parquet"]
    everything = list(sources.sample_texts(files, "text", 10**9))
    assert len(everything) == 1500
    some = list(sources.sample_texts(files, "text", 30_000))
    assert some == list(sources.sample_texts(files, "text", 30_000))
    assert 200 < len(some) < 500 and {text[:3] for text in some} == {"x/a", "x/b", "y/c"}
    with pytest.raises(ValueError, match="no column body"):
        list(sources.sample_texts(files, "body", 100))


def test_manifest_files_that_are_damaged(tmp_path: Path, tokenizer, write_parquet, make_texts) -> None:
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 30))
    prepare([source], tmp_path / "out", tokenizer, HALF)
    prefix = tmp_path / "out/train"
    (tmp_path / "out/tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match="tokenizer.model"):
        tokenizer_of(prefix)
    (tmp_path / "out/train.token_bytes.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="token_bytes.npy is damaged"):
        read_token_bytes(prefix)
    (tmp_path / "out/train.manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        read_manifest(prefix)
    with pytest.raises(FileNotFoundError, match="written by prepare"):
        read_manifest(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="bits per byte"):
        read_token_bytes(tmp_path / "other")
