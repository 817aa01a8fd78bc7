from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moe_train.checkpoint.state import state_bytes
from moe_train.training.guard.left_out import Rewind, write_rewinds
from moe_train.training.history import Stretch, continued, from_plain, last_step, read_history, to_plain, write_history
from moe_train.training.options import TrainOptions
from moe_train.training.run_config import RunConfig, to_dict
from moe_train.training.step_samples import not_learned, samples_of_step, step_of_sample

CONFIG = RunConfig(train=TrainOptions(steps=5, global_batch_size=12, micro_batch_size=2))


def stretch(after: int, processes: int = 1, run: str = "run", config: RunConfig = CONFIG) -> Stretch:
    return Stretch(after, run, processes, to_dict(config), {"seed": 0})


def taken(run_dir: Path, history: list[Stretch], steps: int) -> None:
    """What a run leaves behind that has taken so many steps."""
    write_history(run_dir, history)
    records = [json.dumps({"kind": "train", "step": step + 1}) for step in range(steps)]
    (run_dir / "metrics.jsonl").write_text("\n".join([*records, '{"kind": "tr']))


def checkpoint(run_dir: Path, history: list[Stretch], step: int) -> None:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_bytes(state_bytes({"step": step, "history": to_plain(history)}, b""))
    (folder.parent / "latest").write_text(folder.name)


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_ranks_share_the_samples_of_a_step(tmp_path: Path, processes: int) -> None:
    taken(tmp_path, [stretch(0, processes)], 3)
    whole = samples_of_step(tmp_path, 3).indices
    assert whole == list(range(24, 36))
    shares = [samples_of_step(tmp_path, 3, rank).indices for rank in range(processes)]
    assert sorted(sample for share in shares for sample in share) == whole
    # The first micro-batches of all ranks come before the second ones.
    assert [share[:2] for share in shares] == [[24 + 2 * rank, 25 + 2 * rank] for rank in range(processes)]
    with pytest.raises(ValueError, match=f"ranks 0 to {processes - 1}, not {processes}"):
        samples_of_step(tmp_path, 3, processes)


def test_a_step_is_shared_as_when_it_was_taken(tmp_path: Path) -> None:
    """By other processes in micro-batches of another size, in three parts of a run that began as another one."""
    wide = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, micro_batch_size=3, steps=9))
    history = [stretch(0, 6, "first"), stretch(2, 2, config=wide), stretch(4, 1, config=wide)]
    taken(tmp_path, history, 7)
    assert [samples_of_step(tmp_path, step, 0).indices[:4] for step in (2, 3, 5)] == [
        [12, 13],
        [24, 25, 26, 30],
        [48, 49, 50, 51],
    ]
    assert [samples_of_step(tmp_path, step).stretch.run for step in (1, 2, 3, 7)] == ["first", "first", "run", "run"]
    assert [step_of_sample(tmp_path, sample) for sample in (0, 11, 12, 83)] == [1, 1, 2, 7]
    with pytest.raises(ValueError, match="no sample -1"):
        step_of_sample(tmp_path, -1)


def test_steps_that_were_not_taken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*history.json.*--resume auto"):
        samples_of_step(tmp_path, 1)
    taken(tmp_path, [stretch(0)], 3)
    for step, words in (
        (4, "has taken steps 1 to 3, not step 4; it is to take 5: wait, or go on with it by --resume auto"),
        (6, "has taken steps 1 to 3, not step 6; train.steps is 5"),
        (0, "counted from 1"),
        (-1, "counted from 1"),
    ):
        with pytest.raises(ValueError, match=words):
            samples_of_step(tmp_path, step)
    for sample, words in (
        (36, "has read 36 samples, 0 to 35, in 3 steps of 12, not sample 36; it is to read 60: wait"),
        (60, "not sample 60; it is to read 60$"),
    ):
        with pytest.raises(ValueError, match=words):
            step_of_sample(tmp_path, sample)
    taken(tmp_path, [stretch(0)], 0)
    with pytest.raises(ValueError, match="has read no sample yet, not sample 0"):
        step_of_sample(tmp_path, 0)
    with pytest.raises(ValueError, match="has taken no step yet, not step 1"):
        samples_of_step(tmp_path, 1)


def test_a_record_that_begins_late(tmp_path: Path) -> None:
    """The run went on from a checkpoint that held no history."""
    taken(tmp_path, [stretch(2)], 4)
    assert samples_of_step(tmp_path, 3).indices[0] == 24
    with pytest.raises(ValueError, match="begins after step 2.*what step 2 read is not known"):
        samples_of_step(tmp_path, 2)


def test_a_damaged_record(tmp_path: Path) -> None:
    for text in ("", "[]", '{"stretches": [{"after": 1}]}'):
        (tmp_path / "history.json").write_text(text)
        with pytest.raises(ValueError, match="history.json is damaged"):
            read_history(tmp_path)


def test_a_start_that_changes_nothing_adds_nothing() -> None:
    """A run that is stopped a thousand times does not carry a thousand configurations."""
    history = [stretch(0), stretch(10, 2)]
    assert continued(history, stretch(20, 2)) == history
    assert continued(history, stretch(20, 4)) == [*history, stretch(20, 4)]
    assert continued(from_plain(json.loads(json.dumps(to_plain(history)))), stretch(20, 2)) == history


def test_going_back_forgets_what_came_after() -> None:
    history = [stretch(0), stretch(10, 2), stretch(20, 4)]
    assert continued(history, stretch(15, 8)) == [*history[:2], stretch(15, 8)]
    assert continued(history, stretch(10, 1)) == history[:1]
    assert continued(history, stretch(0, 3)) == [stretch(0, 3)]


def test_the_last_step_by_metrics_or_checkpoint(tmp_path: Path) -> None:
    """Metrics may be written rarely; a checkpoint of steps that the run went back behind does not count."""
    history = [stretch(0), stretch(2, 2)]
    taken(tmp_path, history, 3)
    assert last_step(tmp_path, history) == 3
    checkpoint(tmp_path, history, 4)
    assert last_step(tmp_path, history) == 4
    checkpoint(tmp_path, [stretch(0)], 5)
    assert last_step(tmp_path, history) == 3
    (tmp_path / "checkpoints" / "latest").write_text("step_00000009")
    assert last_step(tmp_path, history) == 3
    (tmp_path / "metrics.jsonl").unlink()
    assert last_step(tmp_path, history) == 2


def test_steps_that_the_guard_did_not_let_be_learned(tmp_path: Path) -> None:
    first, run = tmp_path / "first", tmp_path / "run"
    first.mkdir()
    run.mkdir()
    history = [stretch(0, run=str(first)), stretch(2, run=str(run))]
    taken(first, history[:1], 2)
    taken(run, history, 5)
    guard = [{"kind": "guard", "bad_step": 2, "action": "skip", "message": "the loss is nan"}]
    guard.append({"kind": "guard", "bad_step": 1, "action": "warn", "message": "a spike"})
    for folder in (first, run):  # what the other one says of a step that it did not take does not count
        path = folder / "metrics.jsonl"
        path.write_text("\n".join([*map(json.dumps, guard), path.read_text()]))
        guard[0]["bad_step"] = 1
    write_rewinds(run, [Rewind(5, 3, 4, "spike")])
    notes = [not_learned(samples_of_step(run, step)) for step in range(1, 6)]
    assert notes[0] == notes[2] == "" and "skipped" in notes[1] and "the loss is nan" in notes[1]
    assert "left out since a rewind" in notes[3] and notes[4] == notes[3]
