"""The same bytes for any number of workers, for tasks and a merge, and for a job that was killed on the way."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moe_train.data.indexed import IndexedDataset
from moe_train.data.prepare import How, PrepareOptions, prepare
from moe_train.data.prepare.executors import Processes
from moe_train.data.prepare.tasks import Tasks
from moe_train.data.sources import find_sources
from moe_train.data.tokenizers import SentencePieceTokenizer, load_tokenizer
from moe_train.data.tokenizers.gigatoken_engine import fast_tokenizer
from tests.unit.data.prepare.conftest import contents

OPTIONS = PrepareOptions(validation_fraction=0.2, shard_tokens=3000, max_tokens=20_000, sample=0.9)

Run = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def sources(tmp_path: Path, write_parquet, make_texts) -> Path:
    """Files of three kinds, some cut into many pieces."""
    folder = tmp_path / "in"
    for number in range(3):
        write_parquet(folder / f"{number}.parquet", make_texts(number, 150), row_group_size=5)
    (folder / "lines.jsonl").write_text("".join(f'{{"text": "line {i} {"x" * (i % 90)}"}}\n' for i in range(300)))
    (folder / "zlast.txt").write_text("a document\n" * 20)
    return folder


@pytest.fixture
def expected(tmp_path: Path, run: Run, sources: Path) -> dict[str, bytes]:
    """What one process gives that does all in one piece per file."""
    run([sources], tmp_path / "expected/x", OPTIONS, piece_bytes=1 << 30)
    found = contents(tmp_path / "expected")
    assert sum(name.endswith(".idx") for name in found) > 5
    return found


def same(folder: Path, expected: dict[str, bytes]) -> None:
    found = contents(folder)
    assert set(found) == set(expected)
    for name, content in expected.items():
        assert found[name] == content, name
    assert not list(folder.glob("*.work"))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers(
    tmp_path: Path, run: Run, sources: Path, expected: dict[str, bytes], workers: int
) -> None:
    run([sources], tmp_path / "out/x", OPTIONS, workers=workers)
    same(tmp_path / "out", expected)


def test_the_fast_engine_in_workers(tmp_path: Path, sources: Path, byte_level: Path) -> None:
    files, reference = find_sources([sources]), load_tokenizer(byte_level)
    prepare(files, tmp_path / "expected/x", reference, OPTIONS, How(workers=1))
    for workers in (1, 2):
        how = How(workers=workers, piece_bytes=4000)
        prepare(files, tmp_path / f"out{workers}/x", fast_tokenizer(reference), OPTIONS, how)
        same(tmp_path / f"out{workers}", contents(tmp_path / "expected"))


@pytest.mark.parametrize("piece_bytes", [1, 700, 100_000])
def test_however_it_is_cut(
    tmp_path: Path, run: Run, sources: Path, expected: dict[str, bytes], piece_bytes: int
) -> None:
    run([sources], tmp_path / "out/x", OPTIONS, piece_bytes=piece_bytes)
    same(tmp_path / "out", expected)


def test_tasks_and_a_merge(tmp_path: Path, run: Run, sources: Path, expected: dict[str, bytes]) -> None:
    for task in random.Random(1).sample(range(1, 6), 5):
        with pytest.raises(
            ValueError, match=r"\d+ of \d+ pieces are not done; run all tasks first|no task has done anything"
        ):
            run([sources], tmp_path / "out/x", OPTIONS, merge_only=True)
        assert run([sources], tmp_path / "out/x", OPTIONS, task=(task, 5), workers=1 + task % 2) == {}
    assert run([sources], tmp_path / "out/x", OPTIONS, merge_only=True).keys() == {"train", "validation"}
    same(tmp_path / "out", expected)
    assert run([sources], tmp_path / "out/x", OPTIONS, task=(1, 5)) == {}


@pytest.mark.parametrize(
    "how", [{"workers": 0}, {"task": (0, 3)}, {"task": (4, 3)}, {"task": (1, 2), "merge_only": True}]
)
def test_ways_that_make_no_sense(how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least one worker|numbered from 1|choose one"):
        How(**how)


@pytest.mark.slow
def test_ray(tmp_path: Path, run: Run, sources: Path, expected: dict[str, bytes]) -> None:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"working_dir": None})
    try:
        run([sources], tmp_path / "out/x", OPTIONS, executor="ray")
    finally:
        ray.shutdown()
    same(tmp_path / "out", expected)


def _child(source: str, prefix: str, model: str, workers: int) -> None:
    prepare(
        find_sources([source]), prefix, SentencePieceTokenizer(model), OPTIONS, How(workers=workers, piece_bytes=2500)
    )


def test_killed_at_any_moment(tmp_path: Path, sources: Path, tokenizer: SentencePieceTokenizer) -> None:
    """At least 20 kills by SIGKILL, over the whole of a job; what is published is whole at every moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "pyarrow.compute", "pyarrow.parquet", "sentencepiece"])
    rng = random.Random(os.urandom(8))
    source = str(sources / "0.parquet")

    def begin(folder: Path) -> Any:
        process = context.Process(target=_child, args=(source, str(folder / "x"), str(tokenizer.path), 1))
        process.start()
        return process

    begin(tmp_path / "first").join()  # the server takes its time
    start = time.monotonic()
    begin(tmp_path / "once").join()
    whole = time.monotonic() - start
    expected = contents(tmp_path / "once")
    kills = 0
    for attempt in range(200):
        folder = tmp_path / f"out{attempt}"
        for _ in range(30):
            process = begin(folder)
            process.join(rng.uniform(0.1, 1.0) * whole)
            if not process.is_alive():
                break
            process.kill()
            process.join()
            kills += 1
            for index in folder.glob("*.idx"):
                IndexedDataset(str(index)[: -len(".idx")]).verify()
                assert index.read_bytes() == expected[index.name]
        process = begin(folder)
        process.join()
        assert process.exitcode == 0
        same(folder, expected)
        if kills >= 20:
            return
    raise AssertionError(f"only {kills} kills")


def test_workers_end_with_the_one_that_is_killed(
    tmp_path: Path, sources: Path, expected: dict[str, bytes], tokenizer: SentencePieceTokenizer
) -> None:
    script = _script(tmp_path, sources, tokenizer, 2)
    process = subprocess.Popen([sys.executable, str(script)])
    while not list(tmp_path.glob("out/x.work/*.json")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while _with_argument(str(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _with_argument(str(process.pid))
    assert subprocess.run([sys.executable, str(script)]).returncode == 0
    same(tmp_path / "out", expected)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_killed_at_any_moment_with_workers(
    tmp_path: Path, sources: Path, expected: dict[str, bytes], tokenizer: SentencePieceTokenizer, workers: int
) -> None:
    script = _script(tmp_path, sources, tokenizer, workers)
    start = time.monotonic()
    assert subprocess.run([sys.executable, str(script)]).returncode == 0
    whole = time.monotonic() - start
    same(tmp_path / "out", expected)
    rng = random.Random(os.urandom(8))
    kills = 0
    while kills < 8:
        shutil.rmtree(tmp_path / "out")
        for _ in range(8):
            process = subprocess.Popen([sys.executable, str(script)])
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.4, 1.0) * whole)
                break
            process.kill()
            process.wait()
            kills += 1
        assert subprocess.run([sys.executable, str(script)]).returncode == 0
        same(tmp_path / "out", expected)


def _script(tmp_path: Path, sources: Path, tokenizer: SentencePieceTokenizer, workers: int) -> Path:
    """A program that prepares the sources as `out/x`."""
    arguments = ", ".join(map(repr, (str(sources), str(tmp_path / "out/x"), str(tokenizer.path), workers)))
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[4])!r})\n"
        "from tests.unit.data.prepare.test_restart import _child\n"
        f"if __name__ == '__main__': _child({arguments})"
    )
    return script


def _with_argument(parent: str) -> list[str]:
    """Command lines of processes that the spawn method began for this parent."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if f"parent_pid={parent}" in line or f"parent_pid = {parent}" in line:
            found.append(line)
    return found


def test_a_worker_that_dies(
    tmp_path: Path, run: Run, sources: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Tasks._executor

    def deadly(self: Tasks, tokenizer: Any, tasks: int) -> Any:
        executor = begun(self, tokenizer, tasks)
        assert isinstance(executor, Processes)
        submit = executor._submit

        def kill_one(task: Any) -> Any:
            future = submit(task)
            with contextlib.suppress(ProcessLookupError):  # it is dead by the second task
                os.kill(next(iter(executor._pool._processes)), signal.SIGKILL)
            return future

        executor._submit = kill_one  # type: ignore[method-assign]
        return executor

    with monkeypatch.context() as patch:
        patch.setattr(Tasks, "_executor", deadly)
        with pytest.raises(OSError, match="a worker process died"):
            run([sources], tmp_path / "out/x", OPTIONS, workers=2)
    run([sources], tmp_path / "out/x", OPTIONS, workers=2)
    same(tmp_path / "out", expected)


def test_a_pool_that_is_just_breaking(tmp_path: Path, run: Run, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers so for a moment, before it knows itself that a worker is dead."""

    def closed(*_: Any) -> Any:
        raise OSError("handle is closed")

    monkeypatch.setattr(ProcessPoolExecutor, "submit", closed)
    with pytest.raises(OSError, match="a worker process died .*run the same command again"):
        run([sources], tmp_path / "out/x", OPTIONS, workers=2)


def test_an_unfinished_job_refuses_another(tmp_path: Path, run: Run, sources: Path) -> None:
    run([sources], tmp_path / "out/x", OPTIONS, task=(1, 2))
    with pytest.raises(ValueError, match="unfinished job that differs; .*options.sample: 0.9 there, 1.0 now"):
        run(
            [sources], tmp_path / "out/x", PrepareOptions(validation_fraction=0.2, shard_tokens=3000, max_tokens=20_000)
        )


def test_two_at_once(tmp_path: Path, run: Run, sources: Path) -> None:
    import fcntl

    run([sources], tmp_path / "out/x", OPTIONS, task=(1, 2))
    with open(tmp_path / "out/x.work/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        run([sources], tmp_path / "out/x", OPTIONS, task=(2, 2))  # tasks may
        with pytest.raises(ValueError, match="another process is at work"):
            run([sources], tmp_path / "out/x", OPTIONS)
