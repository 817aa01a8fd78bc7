"""What is installed into an image must not replace what it has."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "docker" / "pins.py"


def add(folder: Path, name: str, version: str, module: str = "") -> None:
    """A package as pip leaves it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if module:
        (folder / module).mkdir()
        (folder / module / "__init__.py").write_text("raise ImportError('needs a driver that a builder has not')")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """With what lies in the folder alone."""
    return subprocess.run(
        [sys.executable, "-S", str(SCRIPT), *arguments],
        env={"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    folder = tmp_path / "image"
    add(folder, "torch", "2.13.0+cu130", "torch")
    add(folder, "Typing_Extensions", "4.16.0")
    add(folder, "pip", "24.0")
    return folder


def test_everything_is_pinned_but_the_installers(image: Path) -> None:
    assert run(image, "pins").stdout.splitlines() == [
        f"# torch at {image / 'torch' / '__init__.py'}",
        *("torch==2.13.0+cu130", "typing-extensions==4.16.0"),
    ]


def test_an_image_without_torch(tmp_path: Path) -> None:
    add(tmp_path, "numpy", "2.0")
    result = run(tmp_path, "pins")
    assert result.returncode == 1 and "TORCH=" in result.stderr


@pytest.mark.parametrize("package", ["torch", "typing_extensions"])
def test_a_replaced_package_ends_the_build(image: Path, tmp_path: Path, package: str) -> None:
    before = tmp_path / "before.txt"
    before.write_text(run(image, "pins").stdout)
    add(image, "numpy", "2.4.6")
    assert run(image, "check", str(before)).returncode == 0
    # An environment of our own comes first on the path.
    ours = tmp_path / "ours"
    add(ours, package, "2.14.0", package)
    result = run(Path(f"{ours}:{image}"), "check", str(before))
    assert result.returncode == 1 and package.replace("_", "-") in result.stderr


def test_a_moved_torch_ends_the_build(image: Path, tmp_path: Path) -> None:
    """The same version from another place is another build."""
    before = tmp_path / "before.txt"
    before.write_text(run(image, "pins").stdout)
    ours = tmp_path / "ours"
    add(ours, "torch", "2.13.0+cu130", "torch")
    assert run(Path(f"{ours}:{image}"), "check", str(before)).returncode == 1


def test_requirements_are_those_of_the_package(tmp_path: Path) -> None:
    plain = run(tmp_path, "requirements", str(ROOT / "pyproject.toml"), "").stdout.splitlines()
    names = {Requirement(line).name for line in plain}
    assert {"torch", "deepspeed", "megatron-core"} <= names and "pytest" not in names
    more = run(tmp_path, "requirements", str(ROOT / "pyproject.toml"), "data,s3").stdout.splitlines()
    assert {Requirement(line).name for line in more} - names == {"gigatoken", "tiktoken", "tokenizers", "s3fs"}
    result = run(tmp_path, "requirements", str(ROOT / "pyproject.toml"), "dta")
    assert result.returncode == 1 and "dta" in result.stderr


def test_our_own_requirement_admits_the_torch_of_a_base(tmp_path: Path) -> None:
    """A range: an exact version would be installed over the base's."""
    lines = run(tmp_path, "requirements", str(ROOT / "pyproject.toml")).stdout.splitlines()
    torch = next(found for line in lines if (found := Requirement(line)).name == "torch")
    for version in ("2.10.0", "2.11.0+cu128", "2.13.0+cpu"):
        assert torch.specifier.contains(version)
    assert importlib.util.find_spec("torch") is not None


def test_install_installs_by_constraint() -> None:
    """The one line that installs what the package needs, between the two looks at what is there."""
    script = (ROOT / "docker" / "install.sh").read_text()
    pins = script.index('pins.py" pins > "$here/pins.txt"')
    install = script.index('pip install --constraint "$here/pins.txt"')
    check = script.index('pins.py" check "$here/pins.txt"')
    assert pins < install < check and "unset PIP_CONSTRAINT" in script
