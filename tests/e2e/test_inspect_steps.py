"""What `inspect RUN --step K` says against what the training loop was given, over stops and other processes."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

from moe_train.data.indexed import IndexedWriter
from tests.e2e.conftest import VOCAB

Texts = list[tuple[list[int], list[int]]]
"""Per sample what is read and what is predicted."""


def train_and_record(run: Path, resume: str | None, overrides: list[str]) -> dict[int, Texts]:
    """Trains on every rank of a pool; returns what this rank's steps were given."""
    from moe_train.training import trainer
    from moe_train.training.run_config import load_run_config
    from moe_train.training.stop import StopRequest

    seen: dict[int, Texts] = {}

    def recorded(engine: Any, batches: Any, *, step: int, **more: Any) -> Any:
        seen[step + 1] = [
            (ids[~padding].tolist(), labels[~padding].tolist())
            for batch in batches
            for ids, labels, padding in zip(batch.ids_BS, batch.labels_BS, batch.padding_BS, strict=True)
        ]
        return real(engine, batches, step=step, **more)

    real = trainer.train_step
    with mock.patch.object(trainer, "train_step", recorded), contextlib.redirect_stdout(io.StringIO()):
        assert trainer.train(load_run_config("tiny", overrides), run, resume, StopRequest())
    dist.barrier()
    return seen


@dataclass(frozen=True)
class Runs:
    root: Path
    documents: dict[str, list[np.ndarray]]
    steps: dict[int, list[Texts]]
    """By step, of each rank in turn."""


@pytest.fixture(scope="module")
def runs(processes: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Run `one`: steps 1 to 3 on one process, 4 to 6 on two. Run `two` begins with its last checkpoint, on other data,
    cut otherwise: steps 7 and 8 on one process."""
    root = tmp_path_factory.mktemp("inspected")
    rng = np.random.default_rng()
    documents = {}
    for name in ("a", "b"):
        documents[name] = [rng.integers(0, VOCAB, rng.integers(0, 40)) for _ in range(60)]
        with IndexedWriter(root / f"{name}_text_document", VOCAB) as writer:
            for document in documents[name]:
                writer.add(document)
    common = [f"model.vocab_size={VOCAB}", "data.sequence_length=24", "data.validation=''", "eval.every=0"]
    first, second = [*common, f"data.train={root}/a"], [*common, f"data.train={root}/b", "seed=9"]
    documents_whole = ["data.sampler=documents", "data.pack_documents=true"]
    plan: list[tuple[int, str, str | None, list[str]]] = [
        (1, "one", None, [*first, "train.steps=3"]),
        (2, "one", "auto", [*first, "train.steps=6", "train.micro_batch_size=1"]),
        (1, "two", f"{root}/one/checkpoints/step_00000006", [*second, *documents_whole, "train.steps=8"]),
    ]
    steps: dict[int, list[Texts]] = {}
    for count, run, resume, overrides in plan:
        found = processes(count).run(train_and_record, run=root / run, resume=resume, overrides=overrides)
        processes(count).close()
        for step in found[0]:
            assert step not in steps
            steps[step] = [of_rank[step] for of_rank in found]
    assert sorted(steps) == list(range(1, 9))
    return Runs(root, documents, steps)


def inspect(*arguments: object) -> tuple[int, str, str]:
    from moe_train.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["inspect", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def named(runs: Runs, *arguments: object) -> Texts:
    """The texts of the samples that inspect names, put together from the documents as they were written."""
    code, out, err = inspect(*arguments)
    assert code == 0, err
    samples: list[tuple[str, list[np.ndarray]]] = []
    for line in out.splitlines()[1:]:
        if found := re.fullmatch(r"sample \d+: (.*), epoch \d+", line):
            samples.append((Path(found[1]).name, []))
        else:
            found = re.fullmatch(r"  document (\d+), its tokens (\d+) to (\d+)", line)
            assert found is not None, line
            name, pieces = samples[-1]
            pieces.append(runs.documents[name][int(found[1])][int(found[2]) : int(found[3]) + 1])
    texts = []
    for name, pieces in samples:
        # Windows go over the boundaries of documents, whole documents are texts of their own.
        parts = [np.concatenate(pieces)] if name == "a" else pieces
        ids, labels = (np.concatenate([part[cut] for part in parts]) for cut in (slice(-1), slice(1, None)))
        texts.append((ids.tolist(), labels.tolist()))
    return texts


@pytest.mark.parametrize("step", range(1, 9))
def test_inspect_names_what_the_step_was_given(runs: Runs, step: int) -> None:
    ranks = runs.steps[step]
    assert len(ranks) == (2 if 4 <= step <= 6 else 1) and all(ids for texts in ranks for ids, _ in texts)
    for run in ("one", "two") if step <= 6 else ("two",):
        whole = named(runs, runs.root / run, "--step", step)
        assert sorted(whole) == sorted(text for texts in ranks for text in texts) and len(whole) == 4
        for rank, texts in enumerate(ranks):
            assert named(runs, runs.root / run, "--step", step, "--rank", rank) == texts
        code, _, err = inspect(runs.root / run, "--step", step, "--rank", len(ranks))
        assert code == 2 and f"data-parallel ranks 0 to {len(ranks) - 1}, not {len(ranks)}" in err


def test_it_says_which_run_took_the_step(runs: Runs) -> None:
    for run, step, says in (("two", 6, True), ("two", 7, False), ("one", 6, False)):
        _, out, _ = inspect(runs.root / run, "--step", step)
        assert (f"taken by {runs.root}/one" in out.splitlines()[0]) == says


def test_a_step_that_was_not_taken(runs: Runs) -> None:
    for run, step, words in (
        ("one", 7, "has taken steps 1 to 6, not step 7; train.steps is 6"),
        ("two", 9, "has taken steps 1 to 8, not step 9"),
        ("two", 0, "counted from 1"),
    ):
        code, _, err = inspect(runs.root / run, "--step", step)
        assert code == 2 and words in err


def test_a_sample_of_a_run_with_its_tokens(runs: Runs) -> None:
    """The number is that of the list of a step; cut as the run cut it, also where another run did."""
    for index in (2, 17, 29):
        code, out, err = inspect(runs.root / "two", "--sample", index)
        assert code == 0, err
        assert f"read by step {index // 4 + 1}" in out.splitlines()[0]
        shown = [[int(x) for x in line.split()] for line in out.splitlines() if re.fullmatch(r"[\d ]+", line)]
        [(ids, labels)] = [named(runs, runs.root / "two", "--step", index // 4 + 1)[index % 4]]
        parts = [sum(shown, [])] if index < 24 else shown
        assert sum((part[:-1] for part in parts), []) == ids
        assert sum((part[1:] for part in parts), []) == labels
    code, _, err = inspect(runs.root / "two", "--sample", 32)
    assert code == 2 and "has read 32 samples, 0 to 31, in 8 steps of 4, not sample 32" in err


def test_the_other_run_may_be_gone_but_not_its_data(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "two"
    shutil.copytree(runs.root / "two", run)
    shutil.move(runs.root / "one", tmp_path / "away")
    try:
        assert sorted(named(runs, run, "--step", 2)) == sorted(runs.steps[2][0])
        for file in ("a_text_document.bin", "a_text_document.idx"):
            shutil.move(runs.root / file, tmp_path / file)
        code, _, err = inspect(run, "--step", 2)
        assert code == 2 and f"the data of step 2, which {runs.root}/one took, is not at hand" in err
        with IndexedWriter(runs.root / "a_text_document", VOCAB) as writer:
            writer.add(np.arange(200))
        code, _, err = inspect(run, "--step", 2)
        assert code == 2 and "data set a: documents 60 then, 1 now" in err and "is not what step 2" in err
    finally:
        for file in ("a_text_document.bin", "a_text_document.idx"):
            shutil.move(tmp_path / file, runs.root / file)
        shutil.move(tmp_path / "away", runs.root / "one")


def test_a_run_without_a_record(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs.root / "two", tmp_path / "two")
    (tmp_path / "two" / "history.json").unlink()
    code, _, err = inspect(tmp_path / "two", "--step", 2)
    assert code == 2 and "history.json" in err and "--resume auto" in err
