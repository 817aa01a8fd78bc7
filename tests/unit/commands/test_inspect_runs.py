"""``moe-train inspect`` of a run: from a step back to the documents that it read."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from moe_train.cli import main
from moe_train.data.manifest import tokenizer_of
from moe_train.data.options import BlendMember, DataOptions, Stage
from moe_train.data.training_set import open_training_set
from moe_train.training.history import Stretch, write_history
from moe_train.training.options import TrainOptions
from moe_train.training.run_config import RunConfig, load_run_config, to_dict, to_yaml


@pytest.fixture(scope="module")
def run_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run on a blend that changes at its third step."""
    run = tmp_path_factory.mktemp("runs") / "run"
    data = DataOptions(
        train=[BlendMember(f"{folder}/out/train", 3), BlendMember(f"{folder}/out/validation", 1)],
        stages=[Stage(2, f"{folder}/out/validation")],
        sequence_length=64,
        sampler="documents",
        pack_documents=True,
    )
    config = RunConfig(data=data, train=TrainOptions(steps=4, global_batch_size=8, micro_batch_size=2), seed=3)
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    samples = open_training_set(data, seed=3, batch_size=8, cache=run / "index", once=lambda work: work())
    write_history(run, [Stretch(0, str(run.resolve()), 2, to_dict(config), samples.identity())])
    (run / "metrics.jsonl").write_text('{"step": 3}\n')
    return run


@pytest.mark.parametrize("step", [1, 2, 3])
def test_inspect_names_what_a_step_read(
    run_folder: Path, folder: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    """pitfalls row 35 (swiss-ai/Megatron-LM PR126, PR130): from a training step back to file and row. The documents are
    found again by what the batches of the step hold."""
    assert main(["inspect", str(run_folder), "--step", str(step)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": 8 samples")
    config = load_run_config(run_folder / "config.yaml")
    samples = open_training_set(config.data, seed=3, batch_size=8, cache=run_folder / "index", once=lambda work: work())
    batch = samples.batch((step - 1) * 8, 8)
    texts = pq.read_table(folder / "text.parquet").column("text").to_pylist()
    tokenizer = tokenizer_of(folder / "out/train")
    row = -1
    read: list[list[int]] = []
    for line in lines[1:]:
        if found := re.fullmatch(r"sample (\d+): (.*), epoch \d+", line):
            row += 1
            assert int(found[1]) == int(batch.sample_B[row])
            assert step < 3 or found[2].endswith("validation")
            read.append([])
            continue
        found = re.fullmatch(
            r"  document \d+, its tokens (\d+) to (\d+): doc-(\d+) from text.parquet row (\d+), domain prose", line
        )
        assert found is not None and found[3] == found[4]
        whole = [*tokenizer.encode_batch([texts[int(found[4])]])[0].tolist(), tokenizer.eod_id]
        read[-1] += whole[int(found[1]) : int(found[2])]
    assert read == [ids[~padding].tolist() for ids, padding in zip(batch.ids_BS, batch.padding_BS, strict=True)]


def test_inspect_names_what_a_rank_read(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for rank in ("0", "1"):
        assert main(["inspect", str(run_folder), "--step", "2", "--rank", rank]) == 0
        out = capsys.readouterr().out
        seen.append([int(index) for index in re.findall(r"^sample (\d+):", out, re.MULTILINE)])
    assert seen == [[8, 9, 12, 13], [10, 11, 14, 15]]
    for arguments, message in (
        (["--step", "4"], "steps 1 to 3, not step 4"),
        (["--step", "1", "--rank", "2"], "ranks 0 to 1, not 2"),
        (["--rank", "0"], "belongs to --step"),
        (["--sample", "24"], "has read 24 samples, 0 to 23, in 3 steps of 8, not sample 24; it is to read 32: wait"),
        (["--sample", "32"], "not sample 32; it is to read 32\n"),
        (["--sample", "-1"], "no sample -1"),
        (["--sample", "0", "--seed", "3"], "--seed: only for --sample of a data set"),
        (["--document", "0"], "is a folder"),
    ):
        assert main(["inspect", str(run_folder), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_inspect_writes_nothing_into_a_run(
    folder: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be somebody else's. Also where its index is of the data as it was before it was touched, or is gone."""
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder / "out", data)
    shutil.copytree(run_folder, run)
    for name in ("config.yaml", "history.json"):
        (run / name).write_text((run / name).read_text().replace(f"{folder}/out", str(data)))
    commands = [["inspect", str(run), *more] for more in (["--step", "1"], ["--step", "3"], ["--sample", "2"])]

    def everything() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")}

    def shown() -> list[str]:
        assert [main(command) for command in commands] == [0, 0, 0]
        return capsys.readouterr().out.splitlines()

    assert len(list((run / "index").glob("*.index"))) == 2
    for path in data.glob("*.idx"):
        os.utime(path, ns=(1, 1))
    before, first = everything(), shown()
    assert everything() == before
    shutil.rmtree(run / "index")
    before = everything()
    assert shown() == first and everything() == before


def test_inspect_reads_the_index_of_a_run(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is not written where there is one: of a large data set that takes its time."""
    from moe_train.data import index

    def refuse(*_: object, **__: object) -> int:
        raise AssertionError("written again")

    monkeypatch.setattr(index, "write_index", refuse)
    assert main(["inspect", str(run_folder), "--step", "3"]) == 0


def test_inspect_asks_steps_of_runs_alone(
    folder: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What says nothing about steps is told apart from a run that has no record of them."""
    checkpoint = run_folder / "checkpoints" / "step_00000003"
    lost = tmp_path / "step_00000003"
    for path in (checkpoint, lost):
        path.mkdir(parents=True)
        (path / "state.json").write_text("{}")
    for path, option, message in (
        (f"{folder}/out/train", "--step", f"{folder}/out/train is a data set, not the folder of a run"),
        (f"{folder}/out", "--step", "/out is no folder of a run (it holds no config.yaml)"),
        (f"{folder}/out", "--sample", f"did you mean {folder}/out/train or {folder}/out/validation?"),
        (
            checkpoint,
            "--step",
            f"is a checkpoint, not the run itself: ask the run by moe-train inspect {run_folder} --",
        ),
        (checkpoint, "--sample", f"moe-train inspect {run_folder} --sample 3"),
        (
            checkpoint.parent,
            "--step",
            f"is a folder of a run, not the run itself: ask the run by moe-train inspect {run_folder} --",
        ),
        (lost, "--step", "is a checkpoint, not a run (it holds no config.yaml)"),
    ):
        assert main(["inspect", str(path), option, "3"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "--resume auto" not in error
    monkeypatch.chdir(checkpoint)
    assert main(["inspect", ".", "--step", "3"]) == 2
    assert f"moe-train inspect {run_folder.resolve()} --step 3" in capsys.readouterr().err
    shutil.rmtree(checkpoint.parent)
