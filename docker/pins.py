"""What an image has, as pip's constraints, so that nothing is installed over it. Used while the image is built.

pins                               one line name==version for each installed package, and where torch lies
requirements PYPROJECT [A,B]       what the package needs, with the extras A and B
check FILE                         that all which `pins` wrote into FILE is still so
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

_TOOLS = {"pip", "setuptools", "wheel"}
"""What installs; no package of ours needs a version of it."""


def pins() -> list[str]:
    """Of the running interpreter. ValueError where there is no torch to pin to."""
    torch = importlib.util.find_spec("torch")
    if torch is None:
        raise ValueError(
            "the image has no torch: choose another BASE, or say which one to install, "
            "such as --build-arg TORCH=torch==2.13.0"
        )
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name and name not in _TOOLS:
            found.setdefault(name, distribution.version)  # the first on the path is the one that is imported
    return [f"# torch at {torch.origin}", *(f"{name}=={version}" for name, version in sorted(found.items()))]


def requirements(pyproject: Path, extras: Sequence[str] = ()) -> list[str]:
    """Of the package and its extras. ValueError for an extra that it does not have."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    if unknown := sorted(set(extras) - set(optional)):
        raise ValueError(f"EXTRAS: there is no {', '.join(unknown)}; there are {', '.join(sorted(optional))}")
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]


def check(before: Sequence[str], now: Sequence[str]) -> None:
    """ValueError where something that was there is another one now."""
    if changed := sorted(set(before) - set(now)):
        raise ValueError(f"installed over what the image had: {'; '.join(changed)}")


def main(arguments: Sequence[str]) -> int:
    try:
        match list(arguments):
            case ["pins"]:
                print(*pins(), sep="\n")
            case ["requirements", path, *extras]:
                wanted = [extra for extra in ",".join(extras).split(",") if extra]
                print(*requirements(Path(path), wanted), sep="\n")
            case ["check", path]:
                check(Path(path).read_text(encoding="utf-8").splitlines(), pins())
            case _:
                raise ValueError(__doc__)
    except ValueError as error:
        print(f"pins.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
