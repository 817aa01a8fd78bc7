"""A whole comparison: checked, run, and put into tables."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_train.config.errors import listing
from moe_train.data.files import write_atomically
from moe_train.data.options import label_of
from moe_train.lab import demo_data
from moe_train.lab.evaluation_data import check_evaluation_data
from moe_train.lab.experiment import Budget, Experiment, load_experiment
from moe_train.lab.plan import PlannedRun, check_processes, plan
from moe_train.lab.results import check_same_experiment, is_finished, seeds_in
from moe_train.lab.runner import Ending, Runner, execute
from moe_train.lab.writing import MARKDOWN, PAGE, write_tables
from moe_train.launch.run import check_data
from moe_train.training.environment import device_facts, git_commit

Say = Callable[[str], None]
FAILED = 1
COPY = "experiment.yaml"
"""The experiment's file as it was when the last run started."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    experiment: str
    overrides: Sequence[str] = ()
    out: Path | None = None
    only: Sequence[str] = ()
    seeds: Sequence[int] = ()
    steps: int | None = None
    tokens: int | None = None
    processes: int | None = None


@dataclass(frozen=True)
class Comparison:
    """A checked request."""

    title: str
    experiment: Experiment
    source: str
    out: Path
    processes: int
    everything: list[PlannedRun] = field(repr=False)
    """What the tables are of: all arms with the seeds asked for, and what is finished in the folder with others."""
    chosen: list[PlannedRun] = field(repr=False)
    """Those that run now."""


def prepare(request: Request, accelerators: int = 0) -> Comparison:
    """ConfigError or ValueError with everything that is wrong, before anything is started or written."""
    name, path, experiment = load_experiment(request.experiment)
    if request.steps or request.tokens:
        experiment = dataclasses.replace(experiment, budget=Budget(request.steps, request.tokens))
    out = request.out or Path("runs") / "compare" / name
    source = str(path)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose another folder with --out")
    unknown = [name for name in request.only if name not in experiment.arms]
    if unknown:
        raise ValueError(f"--only {unknown[0]}: no such arm in {source}; arms: {listing(experiment.arms)}")
    wanted = plan(experiment, out, source=source, overrides=request.overrides, seeds=request.seeds)
    chosen = [run for run in wanted if not request.only or run.arm in request.only]
    seeds = {run.seed for run in wanted}
    if more := [seed for seed in seeds_in(out, experiment.arms) if seed not in seeds]:
        found = plan(experiment, out, source=source, overrides=request.overrides, seeds=more)
        wanted += [run for run in found if is_finished(run)]
    everything = sorted(wanted, key=lambda run: run.seed) if more else wanted
    processes = request.processes or accelerators or max(run.config.layout_size for run in everything)
    check_processes(everything, processes, source)
    check_same_experiment(everything, out, source)
    return Comparison(experiment.title or name, experiment, source, out, processes, everything, chosen)


def compare(comparison: Comparison, runner: Runner, command: str, say: Say) -> int:
    """Runs what is not finished and writes the tables; returns the exit code: 0, 1 where a run failed, 128 + signal
    where it was stopped. ``command``: the line that made it, for the tables."""
    if code := make_data(comparison, say):
        return code
    check_all_data([run for run in comparison.chosen if not is_finished(run)])
    facts = table_facts(comparison, command)
    comparison.out.mkdir(parents=True, exist_ok=True)
    write_atomically(comparison.out / COPY, Path(comparison.source).read_bytes())

    def progress() -> None:
        write_tables(comparison.experiment, comparison.everything, comparison.out, facts, figures=False)

    ending = execute(comparison.chosen, runner, say, progress)
    if ending.stopped:
        return ending.stopped
    return tables(comparison, facts, ending, say)


def check_all_data(runs: Sequence[PlannedRun]) -> None:
    """ValueError with what is wrong with the data of training and with that of evaluation, so that neither is made
    before the other is known to be missing."""
    found: list[str] = []
    for run in runs:
        try:
            check_data(run.config)
        except ValueError as error:
            found.append(str(error))
    if not found or runs[0].protocol.data:
        try:
            check_evaluation_data(runs)
        except ValueError as error:
            found.append(str(error))
    if found:
        raise ValueError("\n".join(dict.fromkeys(found)))


def tables(comparison: Comparison, facts: dict[str, Any], ending: Ending, say: Say) -> int:
    """Writes everything that can be written, and says where."""
    if not any(is_finished(run) for run in comparison.everything):
        say(f"no run is finished: {', '.join(ending.failed) or 'none was started'}")
        return FAILED
    write_tables(comparison.experiment, comparison.everything, comparison.out, facts)
    print((comparison.out / MARKDOWN).read_text(encoding="utf-8"), flush=True)
    say(f"tables: {comparison.out / MARKDOWN}, {comparison.out / PAGE}")
    if ending.failed:
        say(f"FAILED: {'; '.join(ending.failed)}. The same command tries them again")
    return FAILED if ending.failed else 0


def make_data(comparison: Comparison, say: Say) -> int:
    """The demonstration's data, where a run needs them and they are not there."""
    wanted = {str(demo_data.DATA / name) for name in ("train", "validation")}
    named = {
        label
        for run in comparison.chosen
        for label in (label_of(run.config.data.train), label_of(run.config.data.validation))
        if not is_finished(run)
    }
    return demo_data.make(say) if wanted & named else 0


def table_facts(comparison: Comparison, command: str) -> dict[str, Any]:
    """What the tables say about themselves."""
    from moe_train import __version__

    return {
        "title": comparison.title,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": git_commit(Path(__file__).resolve().parents[2]),
        "version": f"moe_train {__version__}",
        "command": command,
        "device": f"{device_facts()['device']}, {comparison.processes} "
        + ("process" if comparison.processes == 1 else "processes"),
        "python": platform.python_version(),
    }
