from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moe_train.training.environment import environment, git_commit, without_secrets, write_environment


def test_holds_what_a_reader_needs_and_no_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PRIVATE_VALUE", "do-not-write-me")
    monkeypatch.setattr(sys, "argv", ["train", "wandb.api_key=do-not-write-me", "train.steps=3"])
    content = environment(processes=4, hosts=2, model={"total_parameters": 5})
    assert content["processes"] == 4 and content["hosts"] == 2 and content["model"] == {"total_parameters": 5}
    assert content["packages"]["torch"] and content["device"] and content["python"]
    assert content["command"] == ["train", "wandb.api_key=***", "train.steps=3"]
    assert "do-not-write-me" not in json.dumps(content)


def test_secrets_in_a_command_line() -> None:
    line = ["x", "--api-key", "abc", "--password=abc", "tokenizer=a.model", "--auth-token", "abc", "data.train=p"]
    expected = ["x", "--api-key", "***", "--password=***", "tokenizer=a.model", "--auth-token", "***", "data.train=p"]
    assert without_secrets(line) == expected
    line = ["HF_TOKEN=abc", "--token", "abc", "--token=abc", "data=https://me:abc@host/x", "tokens=3", "end_token=5"]
    expected = ["HF_TOKEN=***", "--token", "***", "--token=***", "data=https://***@host/x", "tokens=3", "end_token=5"]
    assert without_secrets(line) == expected
    no_secrets = ["hub_token", "router.options.groups_per_token=2", "--end-token=5", "--end-token", "5"]
    assert without_secrets(no_secrets) == no_secrets


def test_an_earlier_start_is_kept(tmp_path: Path) -> None:
    for number in range(3):
        write_environment(tmp_path, {"processes": number})
    content = json.loads((tmp_path / "environment.json").read_text())
    assert content == {"processes": 2, "earlier": [{"processes": 0}, {"processes": 1}]}


def test_no_commit_outside_of_a_checkout(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
