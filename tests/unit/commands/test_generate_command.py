"""``moe-train generate``: arguments, prompts and what is printed. The model is a stand-in."""

from __future__ import annotations

import argparse
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_train.commands import evaluate, generate
from moe_train.commands.stopping import Terminated


def parse(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    generate.register(parser)
    return parser.parse_args(line)


class Model:
    """Continues each prompt with its own capitals."""

    def __init__(self) -> None:
        self.loaded: list[Any] = []
        self.options: dict[str, Any] = {}
        self.error: BaseException | None = None

    def load(self, path: Path, tokenizer: Path | None) -> Model:
        self.loaded.append((path, tokenizer))
        return self

    def generate(self, prompts: list[str], **options: Any) -> list[Any]:
        from moe_train.evaluation.generation.completion import Completion

        self.options = options
        return [Completion(text=prompt.upper(), ids=[1, 2], finish="length", prompt_tokens=3) for prompt in prompts]

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        from moe_train.evaluation.generation.length_warning import BeyondTraining

        self.options = options
        yield prompt.upper()
        warnings.warn("something of others", UserWarning, stacklevel=1)
        warnings.warn("it is long", BeyondTraining, stacklevel=1)
        if self.error is not None:
            raise self.error
        yield "!"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    found = Model()
    monkeypatch.setattr("moe_train.api.load", found.load)
    return found


def test_one_prompt_is_streamed(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "runs/x",
        "--prompt",
        "abc",
        "--max-new-tokens",
        "7",
        "--temperature",
        "0.5",
        "--top-k",
        "3",
        "--top-p",
        "0.9",
    ]
    assert generate.run(parse(*line, "--seed", "4", "--stop", "x", "--stop", "y", "--tokenizer", "t.model")) == 0
    out, err = capsys.readouterr()
    assert out == "ABC!\n" and err == "moe-train: warning: it is long\n"
    assert model.loaded == [(Path("runs/x"), Path("t.model"))]
    want = {"max_new_tokens": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 4, "stop": ["x", "y"]}
    assert model.options == want


def test_several_prompts_and_json(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one → two\r\n\n  \n{not json\n", encoding="utf-8")
    assert generate.run(parse("runs/x", "--prompt", "first", "--prompts", str(file))) == 0
    assert capsys.readouterr().out == "--- 1: first\nFIRST\n--- 2: one → two\nONE → TWO\n--- 3: {not json\n{NOT JSON\n"
    assert generate.run(parse("runs/x", "--prompt", "é", "--json")) == 0
    assert json.loads(capsys.readouterr().out) == {
        **{"prompt": "é", "text": "É", "ids": [1, 2], "finish": "length", "prompt_tokens": 3}
    }


def test_prompts_as_jsonl_and_from_standard_input(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "two\\nlines", "id": 3}\n\n{"prompt": ""}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    assert generate.read_prompts(["-", "x"], file) == ["from a pipe\n", "x", "two\nlines", ""]


@pytest.mark.parametrize(
    ("given", "name", "content", "message"),
    [
        ([], None, "", "give a text to continue: --prompt"),
        (["-", "-"], None, "", "give it once"),
        ([], "p.txt", "\n \n", "p.txt holds no prompt"),
        ([], "p.jsonl", '{"prompt": "x"}\nno\n', "p.jsonl, line 2 is not JSON"),
        ([], "p.jsonl", '{"prompt": 3}\n', 'p.jsonl, line 1 is no object with a text under "prompt"'),
        ([], "p.jsonl", '["x"]\n', "p.jsonl, line 1 is no object"),
        ([], "p.txt", b"\xff\n", "p.txt is not UTF-8"),
        # Bytes of a command line that are no UTF-8, and what JSON can spell.
        (["a", "b\udcff"], None, "", r"--prompt is not valid Unicode at character 1: 'b\\udcff'"),
        ([], "p.jsonl", '{"prompt": "x"}\n{"prompt": "\\ud800"}\n', "p.jsonl, line 2 is not valid Unicode"),
    ],
)
def test_prompts_that_cannot_be_read(
    tmp_path: Path, given: list[str], name: str | None, content: str | bytes, message: str
) -> None:
    file = None
    if name is not None:
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        generate.read_prompts(given, file)


@pytest.mark.parametrize(("errors", "message"), [("strict", "UTF-8"), ("surrogateescape", "valid Unicode")])
def test_standard_input_that_is_no_text(monkeypatch: pytest.MonkeyPatch, errors: str, message: str) -> None:
    """Python replaces bad bytes in the C locale and refuses them elsewhere."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff\xfe"), "utf-8", errors))
    with pytest.raises(ValueError, match=f"the text of standard input is not {message}"):
        generate.read_prompts(["-"], None)


def test_no_file_of_prompts(tmp_path: Path) -> None:
    for name in (tmp_path / "gone", tmp_path / "gone" / "deeper"):
        with pytest.raises(FileNotFoundError, match=f"^the file of prompts {name} does not exist$"):
            generate.read_prompts([], name)
    with pytest.raises(ValueError, match="is a folder, not a file of prompts"):
        generate.read_prompts([], tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, line in (("p.jsonl", '{"prompt": "é"}\n'), ("p.txt", "é\n")):
        (tmp_path / name).write_text(line, encoding="utf-8-sig")
        assert generate.read_prompts([], tmp_path / name) == ["é"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--top-k", "3"], "no effect at temperature 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--temperature", "1", "--top-p", "2"], "top_p is 2"),
        (["--stop", ""], "stop string is empty"),
        (["--stop", "a", "--stop", "\udcff"], "the text of --stop is not valid Unicode at character 0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(model: Model, line: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate.run(parse("runs/x", "--prompt", "a", *line))
    assert not model.loaded


@pytest.mark.parametrize("error", [KeyboardInterrupt, Terminated])
def test_what_was_written_ends_with_a_line(
    model: Model, capsys: pytest.CaptureFixture[str], error: type[BaseException]
) -> None:
    model.error = error()
    with pytest.raises(error):
        generate.run(parse("runs/x", "--prompt", "abc"))
    assert capsys.readouterr().out == "ABC\n"


class Workers:
    """In place of the launch."""

    def __init__(self, code: int = 0, write: bool = True) -> None:
        self.code, self.write = code, write
        self.request: dict[str, Any] = {}
        self.line: list[str] = []

    def __call__(self, module: str, worker: list[str], run_dir: Path, processes: int) -> int:
        self.line, self.processes, self.run_dir = worker, processes, run_dir
        of = dict(zip(worker[::2], worker[1::2], strict=True))
        self.request = json.loads(Path(of["--request"]).read_text())
        if self.write:
            texts = [{"text": prompt + "…", "ids": [], "finish": "end"} for prompt in self.request["prompts"]]
            Path(of["--output"]).write_text(json.dumps(texts))
        return self.code


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    (tmp_path / "run" / "config.yaml").write_text("")
    return tmp_path / "run"


def test_several_processes(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(evaluate, "launch", workers := Workers())
    line = ["--prompt", "a", "--prompt", "b", "--processes", "2", "--stop", "s"]
    assert generate.run(parse(str(run_dir), *line)) == 0
    assert capsys.readouterr().out == "--- 1: a\na…\n--- 2: b\nb…\n"
    assert workers.processes == 2 and workers.run_dir == run_dir
    assert workers.line[3] == str(run_dir / "checkpoints" / "step_00000004")
    assert workers.request["prompts"] == ["a", "b"] and not workers.request["stream"]
    assert workers.request["options"]["stop"] == ["s"] and workers.request["tokenizer"] is None
    # A single one is printed by the worker that has it.
    assert generate.run(parse(str(run_dir), "--prompt", "a", "--processes", "2")) == 0
    assert workers.request["stream"] and capsys.readouterr().out == ""


def test_a_tokenizer_that_is_not_there_is_said_once(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by each worker."""
    monkeypatch.setattr(evaluate, "launch", workers := Workers())
    with pytest.raises(FileNotFoundError, match="tokenizer .*gone.model does not exist"):
        generate.run(parse(str(run_dir), "--prompt", "a", "--processes", "2", "--tokenizer", f"{run_dir}/gone.model"))
    assert not workers.line


def test_nothing_is_printed_before_the_first_text(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot begin leaves standard output empty, without the end of a line."""

    def fail(prompt: str, **options: Any) -> Iterator[str]:
        raise ValueError("no tokenizer")

    model.stream = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no tokenizer"):
        generate.run(parse("runs/x", "--prompt", "abc"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("code", "write"), [(3, False), (0, False)])
def test_workers_that_fail(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, write: bool
) -> None:
    monkeypatch.setattr(evaluate, "launch", Workers(code, write))
    assert generate.run(parse(str(run_dir), "--prompt", "a", "--processes", "2")) == (code or 1)
    assert "did not finish" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "error"), [(130, KeyboardInterrupt), (143, Terminated)])
def test_workers_that_are_stopped(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[BaseException]
) -> None:
    monkeypatch.setattr(evaluate, "launch", Workers(code, write=False))
    with pytest.raises(error):
        generate.run(parse(str(run_dir), "--prompt", "a", "--processes", "2"))
