"""The doctor's talk with a host, here with a process of this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moe_train.launch import examination
from moe_train.launch.conversation import Conversation, HostError
from moe_train.launch.facts import MARK, digest

ANSWERING = [sys.executable, "-u", "-m", "moe_train.launch.facts"]
CHATTY = f"""
import json, sys
print("welcome to this host")
for line in sys.stdin:
    print("noise"); print({MARK!r} + json.dumps({{"value": json.loads(line)["do"]}}), flush=True)
"""


def test_clock_and_disk(tmp_path: Path) -> None:
    path = tmp_path / "made" / "seen"
    with Conversation(ANSWERING) as host:
        offset, doubt = host.clock()
        assert abs(offset) <= doubt + 0.05
        assert host.ask("look", paths=[str(path)], within=0) == [False]
        host.ask("write", path=str(path))
        assert path.exists() and host.ask("look", paths=[str(path)], within=0) == [True]
        host.ask("remove", path=str(path))
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "file").touch()
        with pytest.raises(HostError, match="NotADirectory|FileExists"):
            host.ask("write", path=str(tmp_path / "file" / "x"))
        with pytest.raises(HostError, match="unknown request"):
            host.ask("dance")


def test_what_a_login_shell_prints_is_no_answer() -> None:
    with Conversation([sys.executable, "-u", "-c", CHATTY]) as host:
        assert [host.ask(word) for word in ("clock", "x")] == ["clock", "x"]


@pytest.mark.parametrize(
    "answer", ['{"value": ', "[]", "5", '{"value": {"kernel": 6}}', '{"value": 3}', '{"value": null}']
)
def test_another_version_of_this_package_is_said_to_be_one(tmp_path: Path, answer: str) -> None:
    script = f"import sys\nfor _ in sys.stdin: print({MARK + answer!r}, flush=True)"
    with Conversation([sys.executable, "-u", "-c", script]) as host:
        assert "another version of moe_train" in examination._facts(host, tmp_path).error


def test_a_host_that_fails_says_why() -> None:
    with Conversation([sys.executable, "-c", "raise SystemExit('Permission denied (publickey).')"]) as host:
        with pytest.raises(HostError, match="publickey"):
            host.ask("clock")


def test_a_host_that_says_nothing() -> None:
    with Conversation([sys.executable, "-c", "import time; time.sleep(60)"]) as host:
        with pytest.raises(HostError, match="no answer within 0.2 s"):
            host.ask("clock", seconds=0.2)


def test_other_files_are_another_version(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    before = digest(tmp_path)
    assert digest(tmp_path) == before
    (tmp_path / "a.py").write_text("2")
    assert digest(tmp_path) != before
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert digest(tmp_path) != before
