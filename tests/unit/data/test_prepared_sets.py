"""What preparation writes, as training opens it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_train.data.dataset import open_dataset, open_loss_mask
from moe_train.data.domains import Domains
from moe_train.data.index import open_index
from moe_train.data.instruction import InstructionOptions
from moe_train.data.manifest import content_of
from moe_train.data.options import DataOptions
from moe_train.data.prepare import PrepareOptions, prepare
from moe_train.data.sources import find_sources
from moe_train.data.training_set import TrainingSet, open_training_set


def opened(folder: Path, **options: object) -> TrainingSet:
    data = DataOptions(sequence_length=16, **options)  # type: ignore[arg-type]
    return open_training_set(data, seed=3, batch_size=2, cache=folder / "cache", once=lambda work: work())


@pytest.mark.parametrize("shard_tokens", [None, 10**9, 300])
def test_sidecars_are_found_however_many_shards(
    tmp_path: Path, tokenizer, write_parquet: Callable[..., Path], make_texts, shard_tokens: int | None
) -> None:
    dumps = [["law", "code"][i % 2] for i in range(40)]
    source = write_parquet(tmp_path / "in.parquet", make_texts(1, 40), dump=dumps)
    prepare(find_sources([source]), tmp_path / "x", tokenizer, PrepareOptions(shard_tokens=shard_tokens))
    dataset = open_dataset(tmp_path / "x")
    assert dataset.stem == str(tmp_path / "x")
    domains = Domains(dataset)
    assert [domains.names[code] for code in domains.codes] == dumps
    assert open_loss_mask(dataset) is None


@pytest.mark.parametrize("shard_tokens", [10**9, 60])
@pytest.mark.parametrize("lost", [["bin", "idx"], ["idx"]])
def test_a_loss_mask_that_is_gone_is_not_overlooked(
    tmp_path: Path, tokenizer, shard_tokens: int, lost: list[str]
) -> None:
    """Training would go on prompts."""
    rows = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    chat = InstructionOptions("prompt-response", "plain")
    options = PrepareOptions(instruction=chat, shard_tokens=shard_tokens)
    prepare(find_sources([tmp_path / "in.parquet"]), tmp_path / "x", tokenizer, options)
    dataset = open_dataset(tmp_path / "x")
    mask = open_loss_mask(dataset)
    assert mask is not None and 0 < mask.read(0, mask.token_count).sum() < dataset.token_count
    for end in lost:
        for path in tmp_path.glob(f"x_00000_loss_document.{end}"):
            path.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="_loss_document|shard 00000 is missing"):
        open_loss_mask(open_dataset(tmp_path / "x"))


def test_other_content_is_another_data_set(tmp_path: Path, tokenizer, write_parquet, make_texts) -> None:
    """Resuming compares it: the same numbers of documents and tokens are not enough."""
    texts = make_texts(1, 40)
    for name, order in (("a", texts), ("b", texts[::-1])):
        write_parquet(tmp_path / f"{name}/in.parquet", order)
        prepare(find_sources([tmp_path / name / "in.parquet"]), tmp_path / name / "x", tokenizer)
    assert content_of(tmp_path / "a/x") != content_of(tmp_path / "b/x")
    identities = [opened(tmp_path, train=str(tmp_path / name / "x")).identity() for name in ("a", "b")]
    assert identities[0]["members"][0]["tokens"] == identities[1]["members"][0]["tokens"]
    assert identities[0] != identities[1]
    assert content_of(tmp_path / "nothing") is None


def test_one_data_set_has_one_name(tmp_path: Path, write_tokens) -> None:
    write_tokens(tmp_path / "p", [40] * 10)
    for other in (f"{tmp_path}/./p", f"{tmp_path}/p_text_document"):
        with pytest.raises(ValueError, match="are the same files; use one name"):
            opened(tmp_path, train=[str(tmp_path / "p"), other])


def test_data_sets_of_one_size_have_orders_of_their_own(tmp_path: Path, write_tokens) -> None:
    for name in ("p", "q"):
        write_tokens(tmp_path / name, [40] * 20)
    samples = opened(tmp_path, train=[str(tmp_path / "p"), str(tmp_path / "q")])
    member_N, place_N = samples.locate(np.arange(2 * samples.samplers[0].samples_per_epoch))
    assert place_N[member_N == 0].tolist() != place_N[member_N == 1].tolist()
    alone = opened(tmp_path, train=str(tmp_path / "p"))
    assert alone.locate(np.arange(20))[1].tolist() == place_N[member_N == 0][:20].tolist()


@pytest.mark.parametrize("damage", ["empty", "short", "odd", "garbage"])
def test_a_damaged_index_is_built_again(tmp_path: Path, write_tokens, damage: str) -> None:
    write_tokens(tmp_path / "p", [9, 1, 7, 12, 3])
    dataset = open_dataset(tmp_path / "p")

    def index() -> list[int]:
        return open_index(
            dataset, str(tmp_path / "p"), 8, tmp_path / "cache", pack=True, once=lambda work: work()
        ).tolist()

    whole = index()
    assert whole
    (path,) = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "short": content[:-8], "odd": content + b"x", "garbage": b"?" * len(content)}[damage]
    )
    assert index() == whole
