"""Text through the command line: from a run that two processes trained, by one process and by two."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import command, environment, moe_train

pytestmark = pytest.mark.slow
PROMPTS = ["The court", "Profit of the", "def f(", "The court", "é🙂"]
DRAWN = ["--temperature", "1.2", "--top-k", "200", "--seed", "3", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps on the synthetic corpus, experts over two processes."""
    folder = tmp_path_factory.mktemp("generate")
    prepared = folder / "data"
    for line in (
        ["prepare", "--corpus", "synthetic", "--documents", 200, "--output", folder / "corpus"],
        ["tokenizer", "train", folder / "corpus", "--output", folder / "t.model", "--vocab-size", 512],
        ["prepare", folder / "corpus", "--output", prepared / "train", "--tokenizer", folder / "t.model"],
        [
            *(
                "train",
                "tiny",
                f"data.train={prepared}/train",
                f"data.validation={prepared}/train",
                "model.vocab_size=512",
            ),
            *("data.sequence_length=32", "parallel.expert=2", "train.steps=4", "eval.every=0", "--processes", 2),
            *("--run-dir", folder / "run"),
        ],
    ):
        result = moe_train(*line)
        assert result.returncode == 0, result.stderr[-3000:]
    return folder / "run"


def completions(*arguments: object) -> list[dict[str, object]]:
    result = moe_train("generate", *arguments, "--json")
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_processes_do_not_matter(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    one = completions(run, "--prompts", file, *DRAWN)
    assert [c["prompt"] for c in one] == PROMPTS and all(c["ids"] for c in one)
    assert one[0]["ids"] != one[3]["ids"]
    assert completions(run, "--prompts", file, *DRAWN, "--processes", 2) == one
    assert completions(run / "checkpoints" / "step_00000004", "--prompt", PROMPTS[1], *DRAWN) == [one[1]]


def test_streamed_text_is_the_text(run: Path) -> None:
    [want] = completions(run, "--prompt", PROMPTS[0], *DRAWN)
    for processes in (1, 2):
        result = moe_train("generate", run, "--prompt", "-", *DRAWN, "--processes", processes, input=PROMPTS[0])
        assert (result.returncode, result.stdout) == (0, f"{want['text']}\n"), result.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_longer_than_the_training(run: Path, processes: int) -> None:
    """One line of ours, whatever the number of processes."""
    line = ["--prompt", "The", "--prompt", "Profit", "--max-new-tokens", 60, "--processes", processes]
    result = moe_train("generate", run, *line)
    assert result.returncode == 0, result.stderr
    [warning] = [line for line in result.stderr.splitlines() if "longer than" in line]
    assert warning.startswith("moe-train: warning: a text is longer than the 32 tokens")
    assert "Traceback" not in result.stderr and "BeyondTraining" not in result.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c(run: Path, processes: int) -> None:
    line = ["generate", run, "--prompt", "The", "--max-new-tokens", 1_000_000, "--processes", processes]
    # Drawn at a high temperature: no end of a document soon, and text from the first token on.
    line += ["--temperature", "1.0", "--top-p", "0.5"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Begun in the background of a shell, it would inherit that Ctrl-C is not heard.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command(*line), env=environment(), **pipes, **heard)  # type: ignore[call-overload]
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert b"moe-train: interrupted" in error and b"Traceback" not in error


def test_bad_input(run: Path, tmp_path: Path) -> None:
    for line, words in (
        ([tmp_path / "gone", "--prompt", "x"], "there is no"),
        ([run], "--prompt TEXT"),
        ([run, "--prompt", "x", "--tokenizer", tmp_path / "no.model"], "no.model does not exist"),
        ([run, "--prompt", "x", "--top-p", "0.5"], "temperature above 0"),
        ([run, "--prompts", tmp_path / "no.txt"], "no.txt does not exist"),
        ([run, "--prompt", "\udcff"], "not valid Unicode"),
    ):
        result = moe_train("generate", *line)
        assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr, result
