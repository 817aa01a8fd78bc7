"""Doctor finds what is there and what is not."""

from __future__ import annotations

import importlib.metadata
import shutil
import time

import pytest

from moe_train.launch import doctor


def packages(monkeypatch: pytest.MonkeyPatch, requirements: list[str]) -> dict[str, doctor.Finding]:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    return {finding.name: finding for finding in doctor._packages()}


def test_versions_against_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    found = packages(monkeypatch, ["torch>=2", "numpy==0.0.1", "no-such-package>=1", "no-such-extra; extra == 'wandb'"])
    assert {name: finding.state for name, finding in found.items()} == {
        "torch": "ok",
        "numpy": "missing",
        "no-such-package": "missing",
    }
    assert found["numpy"].advice == "pip install 'numpy==0.0.1'"


def test_a_package_that_two_extras_name_is_examined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["numpy>=1", "numpy; extra == 'data'", "numpy>=99; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: declared)
    assert [(found.state, found.advice) for found in doctor._packages()] == [
        ("ok", ""),
        ("note", "pip install 'numpy>=99'"),
    ]


def test_tools_that_are_missing_are_only_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    findings = [*doctor._tools(), *doctor._compiler()]
    assert {finding.state for finding in findings} == {"note"}
    assert all("only" in finding.advice for finding in findings)


def test_a_process_group_works() -> None:
    assert doctor.try_process_group() is None


def test_a_process_group_that_hangs_is_given_up() -> None:
    start = time.monotonic()
    assert "did not find each other" in (doctor.try_process_group(seconds=0.01) or "")
    assert time.monotonic() - start < 30


@pytest.mark.slow
def test_a_process_group_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    assert "no_such_interface" in (doctor.try_process_group() or "")
