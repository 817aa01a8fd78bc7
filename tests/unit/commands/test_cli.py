"""The command line as a user meets it."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from moe_train import cli
from moe_train.commands.stopping import Terminated


def test_help_has_every_command_with_an_example() -> None:
    text = cli.help_text()
    for name in ("train", "evaluate", "generate", "report", "prepare", "tokenizer", "inspect", "doctor"):
        assert f"moe-train {name}" in text


def test_help_loads_nothing_heavy() -> None:
    """What makes --help quick: neither torch nor pydantic nor any command is imported."""
    code = (
        "import sys; from moe_train.cli import main; main(['--help'])\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'deepspeed', 'megatron', 'omegaconf', 'moe_train.commands'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["train", "doctor"])
def test_a_commands_help_is_cheap_and_has_the_example(name: str) -> None:
    code = (
        "import sys\nfrom moe_train.cli import main\n"
        "try: main([sys.argv[1], '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(', '.join({'torch', 'deepspeed', 'megatron'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"example:\n  {cli.COMMANDS[name].example}" in result.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_is_for_a_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the marks of docstrings."""
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    out = capsys.readouterr().out
    assert "``" not in out and "moe-train" in out.split("positional arguments:")[-1]


def test_help_of_evaluate_shows_its_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    examples = capsys.readouterr().out.split("examples:")[1]
    assert all(option in examples for option in ("--data", "--documents", "--checkpoint"))


def test_every_command_of_the_table_is_a_module() -> None:
    folder = Path(cli.__file__).parent / "commands"
    assert set(cli.COMMANDS) <= {path.stem for path in folder.glob("*.py")}


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("moe-train ")


def fake_command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(_: object) -> int:
        raise error

    module = types.SimpleNamespace(__doc__="fake", register=lambda parser: None, run=run)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    monkeypatch.delenv("MOE_TRAIN_DEBUG", raising=False)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("wrong"), 2, "moe-train: error: wrong"),
        (FileNotFoundError(2, "No such file", "x.bin"), 2, "x.bin"),
        (KeyboardInterrupt(), 130, "moe-train: interrupted\n"),
        (Terminated("; again"), 143, "moe-train: terminated; again\n"),
    ],
)
def test_errors_of_users(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str
) -> None:
    fake_command(monkeypatch, error)
    assert cli.main(["doctor"]) == code
    assert text in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(monkeypatch, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        cli.main(["doctor", "--debug"])


def test_our_own_mistakes_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(monkeypatch, TypeError("a bug"))
    with pytest.raises(TypeError):
        cli.main(["doctor"])
