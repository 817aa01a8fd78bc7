"""Instruction data through preparation: tokens and, beside them, what the loss counts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_train.data.index_file import write_index
from moe_train.data.indexed import IndexedDataset
from moe_train.data.instruction import InstructionEncoder, InstructionOptions
from moe_train.data.prepare import How, PrepareOptions, prepare
from moe_train.data.sources import find_sources
from tests.unit.data.conftest import english
from tests.unit.data.prepare.conftest import contents

CHAT = InstructionOptions("messages", "plain")


def conversations(seed: int, count: int) -> list[list[dict[str, str]]]:
    rng = random.Random(seed)
    return [
        [
            {"role": role, "content": english(rng, rng.randrange(1, 20))}
            for _ in range(rng.randrange(1, 3))
            for role in ("user", "assistant")
        ]
        for _ in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same kind of rows as parquet and as JSONL, some of them unusable."""
    first, second = conversations(1, 60), conversations(2, 40)
    pq.write_table(
        pa.table({"messages": first, "id": [str(i) for i in range(60)]}), tmp_path / "a.parquet", row_group_size=7
    )
    rows: list[Any] = [{"messages": one} for one in second]
    rows[3] = {"messages": [{"role": "user", "content": "no answer"}]}
    rows[4] = {"messages": []}
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_tokens_and_mask(folder: Path, tokenizer) -> None:
    files = find_sources([folder / "*.*"])
    with pytest.raises(ValueError, match="b.jsonl, row 3: no answer"):
        prepare(files, folder / "out/x", tokenizer, PrepareOptions(instruction=CHAT))
    options = PrepareOptions(instruction=CHAT, on_bad="skip")
    manifest = prepare(files, folder / "out/x", tokenizer, options)[""]
    assert manifest["skipped"] == {"no answer": 1, "no messages": 1}
    usable = [one for place, one in enumerate(conversations(1, 60) + conversations(2, 40)) if place not in (63, 64)]
    wanted = InstructionEncoder(CHAT, tokenizer).encode({"messages": usable})
    text = IndexedDataset(folder / "out/x_text_document")
    assert text.tokens.tolist() == wanted.ids_N.tolist()
    assert text.sequence_lengths.tolist() == wanted.lengths_D.tolist()
    assert (folder / "out/x_loss_document.bin").read_bytes() == wanted.loss_mask_N.tobytes()
    write_index(folder / "mask.idx", np.dtype(np.uint8), len(wanted.lengths_D), [wanted.lengths_D])
    assert (folder / "out/x_loss_document.idx").read_bytes() == (folder / "mask.idx").read_bytes()
    assert 0 < wanted.loss_mask_N.sum() < len(wanted.ids_N)


@pytest.mark.parametrize("limit", [1, 59, 62, 63, 97])
def test_however_it_is_cut(folder: Path, tokenizer, limit: int) -> None:
    files = find_sources([folder / "*.*"])
    options = PrepareOptions(
        instruction=CHAT,
        on_bad="skip",
        max_documents=limit,
        validation_fraction=0.3 if limit > 1 else 0.0,
        shard_tokens=900,
    )
    prepare(files, folder / "whole/x", tokenizer, options)
    prepare(files, folder / "cut/x", tokenizer, options, How(piece_bytes=700, workers=2))
    assert contents(folder / "whole") == contents(folder / "cut")
    documents = sum(json.loads(path.read_text())["documents"] for path in (folder / "cut").glob("*.manifest.json"))
    assert documents == limit


def test_options_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="conversations have no length"):
        PrepareOptions(instruction=CHAT, min_chars=3)
    with pytest.raises(ValueError, match="unknown instruction format 'tales'"):
        PrepareOptions(instruction=InstructionOptions("tales", "plain"))
