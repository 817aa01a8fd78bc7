"""On real text, where MOE_TRAIN_TEST_DATA names a folder with fineweb-schema/*.parquet and gpt2/tokenizer.json."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from moe_train.data.indexed import IndexedDataset
from moe_train.data.prepare import How, PrepareOptions, prepare
from moe_train.data.sources import find_sources, first_texts
from moe_train.data.tokenizers import load_tokenizer
from moe_train.data.tokenizers.gigatoken_engine import with_fast_engine
from tests.unit.data.prepare.conftest import contents

FOLDER = os.environ.get("MOE_TRAIN_TEST_DATA", "")

pytestmark = pytest.mark.skipif(not FOLDER, reason="MOE_TRAIN_TEST_DATA is not set")


def test_real_text(tmp_path: Path) -> None:
    """GPT-2's tokenizer: its own engine in one process, and gigatoken in every other way of working."""
    source = Path(FOLDER) / "fineweb-schema"
    files, reference = find_sources([source]), load_tokenizer(Path(FOLDER) / "gpt2")
    options = PrepareOptions(validation_fraction=0.1, test_fraction=0.1, shard_tokens=200_000)
    prepare(files, tmp_path / "reference/x", reference, options)
    expected = contents(tmp_path / "reference")
    fast = with_fast_engine(reference, first_texts(files, ["text"], 200), print)
    assert fast is not reference
    ways = [{"workers": n} for n in (1, 2, 4)] + [{"executor": "ray", "workers": 2}]
    for number, way in enumerate(ways):
        prepare(files, tmp_path / f"{number}/x", fast, options, How(piece_bytes=1 << 20, **way))
        assert contents(tmp_path / str(number)) == expected
    for task in (2, 3, 1):
        prepare(files, tmp_path / "tasks/x", fast, options, How(piece_bytes=1 << 20, task=(task, 3)))
    prepare(files, tmp_path / "tasks/x", fast, options, How(piece_bytes=1 << 20, merge_only=True))
    assert contents(tmp_path / "tasks") == expected
    shards = [IndexedDataset(str(path)[: -len(".idx")]) for path in sorted((tmp_path / "0").glob("*.idx"))]
    texts = [reference.decode(shard.document(i)) for shard in shards for i in range(len(shard))]
    wanted = [text for file in sorted(source.glob("*.parquet")) for text in pq.read_table(file)["text"].to_pylist()]
    assert Counter(texts) == Counter(text for text in wanted if text)
    assert sum(int(np.sum(shard.tokens == reference.eod_id)) for shard in shards) == len(texts)
