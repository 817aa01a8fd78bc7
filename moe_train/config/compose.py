"""One YAML file per experiment, composed from parts, with dotted overrides. Knows no option of any room.

An experiment names its parts, ``parts: {model: tiny, router: lpr}``. The files <configs>/<kind>/<name>.yaml are merged
at the root in the order in which they are named, then the experiment's own keys, then the overrides
(``train.steps=10``, ``parts.router=lpr``). A part is looked for beside the experiment's folder first, then among the
shipped ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe_train.config.errors import ConfigError, Problem, listing, nearest

EXPERIMENTS = "experiments"
ARMS = "arms"
"""The key that tells a comparison of several runs (``moe-train compare``) from the experiment of one run."""


def shipped_configs() -> Path:
    """Folder of the configurations that come with the package: inside an installed wheel, or configs/ of a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names(kind: str, folder: Path | None = None) -> list[str]:
    """Names of the shipped files of one kind, such as ``experiments`` or ``router``; without comparisons."""
    paths = ((folder or shipped_configs()) / kind).glob("*.yaml")
    return sorted(path.stem for path in paths if kind != EXPERIMENTS or not _is_comparison(path))


def comparisons(folder: Path | None = None) -> list[str]:
    """Names of the shipped comparisons of several runs."""
    paths = ((folder or shipped_configs()) / EXPERIMENTS).glob("*.yaml")
    return sorted(path.stem for path in paths if _is_comparison(path))


def _is_comparison(path: Path) -> bool:
    return any(line.startswith(f"{ARMS}:") for line in path.read_text(encoding="utf-8").splitlines())


def find_experiment(name_or_path: str) -> Path:
    """A path that exists, or else the shipped experiment of that name; ValueError lists what there is."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = shipped_configs() / EXPERIMENTS / f"{name_or_path}.yaml"
    if path.name == name_or_path and shipped.is_file():
        return shipped
    known = names(EXPERIMENTS)
    guess = nearest(name_or_path, known)
    hint = f"Did you mean {guess}? " if guess else ""
    raise ValueError(
        f"no configuration {name_or_path!r}: it is neither a file nor a shipped experiment. {hint}"
        f"Shipped experiments: {listing(known)}"
    )


def compose(name_or_path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The merged configuration as plain dictionaries, without its ``parts``; raises ConfigError or ValueError."""
    path = find_experiment(name_or_path)
    own = _read(path)
    if ARMS in own:
        message = f"this file compares several runs: moe-train compare {name_or_path}"
        raise ConfigError([Problem(ARMS, message)], str(path))
    changes = _parse_overrides(overrides)
    parts = {**(own.get("parts") or {}), **(changes.get("parts") or {})}
    files = [_find_part(str(kind), name, path) for kind, name in parts.items()]
    layers = [*(_read(file) for file in files), own, changes]
    try:
        merged = OmegaConf.merge(*layers)
        result = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([Problem("", _first_line(error))], str(path)) from error
    assert isinstance(result, dict)
    result.pop("parts", None)
    return {str(key): value for key, value in result.items()}


def _read(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError([Problem("", f"no valid YAML: {error}")], str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("", "is not a text file in UTF-8")], str(path)) from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError([Problem("", "must hold sections such as `train:` at its top level")], str(path))
    if "parts" in loaded and not isinstance(loaded.parts, DictConfig):
        raise ConfigError([Problem("parts", "must map kinds to names, such as {model: tiny}")], str(path))
    return loaded


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    problems = []
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key or any(not part for part in key.split(".")):
            problems.append(Problem(text, "an override is written key=value, such as train.steps=10"))
    if problems:
        raise ConfigError(problems, "command line")
    try:
        changes = OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError([Problem("", f"override: {_first_line(error)}")], "command line") from error
    if "parts" in changes and not isinstance(changes.parts, DictConfig):
        raise ConfigError([Problem("parts", "is overridden one by one, such as parts.router=lpr")], "command line")
    return changes


def _find_part(kind: str, name: Any, experiment: Path) -> Path:
    if not isinstance(name, str):
        raise ConfigError([Problem(f"parts.{kind}", f"must be the name of a file, got {name!r}")], str(experiment))
    if name.endswith((".yaml", ".yml")):
        candidates = [experiment.parent / name, Path(name)]
    else:
        candidates = [folder / kind / f"{name}.yaml" for folder in (experiment.parent.parent, shipped_configs())]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = names(kind)
    if not known:
        folders = [folder.name for folder in shipped_configs().iterdir() if folder.is_dir()]
        kinds = [folder for folder in folders if folder != EXPERIMENTS]
        guess, message = nearest(kind, kinds), f"no {name}.yaml and no kind {kind!r}; kinds: {listing(kinds)}"
    else:
        guess, message = nearest(name, known), f"no part {name!r}; there are {listing(known)}"
    hint = f" (did you mean {guess}?)" if guess else ""
    raise ConfigError([Problem(f"parts.{kind}", message + hint)], str(experiment))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
