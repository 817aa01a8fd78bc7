"""From a checked configuration to a finished launch."""

from __future__ import annotations

import os
import sys
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from moe_train.checkpoint.state import read_state
from moe_train.checkpoint.store import latest
from moe_train.data.dataset import data_prefixes
from moe_train.data.files import write_atomically
from moe_train.data.indexed import bin_path
from moe_train.data.options import members_of
from moe_train.launch.ending import Ending
from moe_train.launch.environment import remote_variables, ssh_options, worker_environment
from moe_train.launch.hosts import environment_file
from moe_train.launch.in_process import run_alone, run_task
from moe_train.launch.plan import WORKER, LaunchOptions, command
from moe_train.launch.remote import RemoteHosts, check_pdsh
from moe_train.launch.restart import keep_running
from moe_train.launch.slurm import check_devices, launch_of_step
from moe_train.launch.supervise import Limits, supervise
from moe_train.parallel.passing import may_pass
from moe_train.training.packed import pack
from moe_train.training.run_config import RunConfig, check, to_yaml
from moe_train.training.run_folder import CHECKPOINTS, check_free, check_initial_weights, holds_run

HOSTS_SECONDS = 1800.0
"""How long a restart waits for hosts that do not answer: a switch, a reboot."""
MEETING_SECONDS = 900.0
"""Longer than torchrun's agents wait for one another (600 s, and some more for what follows) before they give up."""


def default_processes(config: RunConfig, accelerators: int, nodes: int = 1) -> int:
    """Per node: all accelerators; without any, as many processes as the layout needs at least."""
    return accelerators or max(1, config.layout_size // nodes)


def check_launch(config: RunConfig, options: LaunchOptions, accelerators: int) -> None:
    """Raises ConfigError or ValueError where configuration, number of processes and machine do not fit."""
    check(config, options.world_size)
    if accelerators and (options.local_processes or 0) > accelerators:
        raise ValueError(
            f"--processes {options.local_processes}, but this machine has {accelerators} accelerator(s); "
            "set DS_ACCELERATOR=cpu to train on the processor"
        )


def check_data(config: RunConfig) -> None:
    """Raises ValueError where the data is not there, before processes are started and a folder is made."""
    data = config.data
    if not data.train:
        raise ValueError("data.train is not set: give the name that `moe-train prepare` wrote: data.train=DIR/train")
    blends = [("data.train", data.train), ("data.validation", data.validation)]
    blends += [(f"data.stages.{number}.train", stage.train) for number, stage in enumerate(data.stages)]
    for key, blend in blends:
        for name, _ in members_of(blend):
            try:
                missing = [path for prefix in data_prefixes(name) if not (path := bin_path(prefix)).is_file()]
            except FileNotFoundError as error:
                raise ValueError(f"{key} = {name}: {error}; see `moe-train prepare`") from None
            if missing:
                raise ValueError(f"{key} = {name}: there is no {missing[0]}; see `moe-train prepare`")


def launch_run(
    config: RunConfig,
    run_dir: Path,
    resume: str | None,
    options: LaunchOptions,
    *,
    accelerators: int,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    base_environment: Mapping[str, str] | None = None,
    init_from: Path | None = None,
    in_process: bool = True,
) -> int:
    """Starts the workers, which make the run folder, and waits for them; returns the exit code of the run.

    in_process: without a launcher, whether this process becomes the worker, which nothing watches over then; False
    starts one for it, and so do restarts.
    """
    check_launch(config, options, accelerators)
    if options.launcher == "srun":
        check_devices(base_environment or os.environ, accelerators)
    if options.node_rank == 0 and not _is_later_task(options, base_environment or os.environ):
        check_free(run_dir, resume)
    if init_from is not None:
        check_initial_weights(init_from, resume)
    check_data(config)
    base = base_environment or os.environ
    # A machine that starts workers elsewhere may have no accelerator itself: then each host looks for its own.
    cpu = base.get("DS_ACCELERATOR", "").lower() == "cpu" if options.by_ssh else not accelerators
    environment = worker_environment(options, base, cpu=cpu)
    if options.launcher == "srun":
        arguments = worker_arguments(run_dir, resume, config_text=to_yaml(config), init_from=init_from)
        return run_task(arguments, environment, run_dir, launch_of_step(base))
    hosts = remote_hosts(options)
    if hosts is not None:
        check_pdsh()
        hosts.check()
    # Other hosts need not see this one's disk to begin.
    text = to_yaml(config) if hosts is not None else None
    config_path = _config_file(run_dir, to_yaml(config)) if text is None else None
    if options.launcher == "none" and in_process and not options.max_restarts:
        arguments = worker_arguments(run_dir, resume, config_path, init_from=init_from)
        return run_alone(arguments, environment, run_dir, _new_launch())
    earlier: list[str] = []

    def start(number: int) -> Ending:
        if number and hosts is not None:
            # Else the start would fail, and a few of those are the end; and what is left there may still write.
            if not hosts.wait(HOSTS_SECONDS, say):
                reason = f"hosts have not answered for {HOSTS_SECONDS:g} s: {', '.join(hosts.silent())}"
                say(reason)
                return Ending(1, reason, restart=True)
            hosts.sweep(earlier)
        try:
            again = "auto" if number and holds_run(run_dir) else resume
        except OSError as error:
            if not may_pass(error):
                raise
            return Ending(1, f"the folder of the run cannot be read: {error}", restart=True)
        arguments = worker_arguments(run_dir, again, config_path, init_from=init_from, config_text=text)
        earlier.append(_new_launch())
        return launch_module(WORKER, arguments, run_dir, options, environment, limits=limits, launch=earlier[-1])

    # torchrun starts its workers again by itself.
    restarts = 0 if options.launcher == "torchrun" else options.max_restarts
    return keep_running(start, lambda: _latest_step(run_dir), restarts)


def _config_file(run_dir: Path, text: str) -> Path:
    """The configuration where the workers of this node find it, at later starts too: the run's folder may or may not be
    on a disk that all nodes see. Rank 0 makes it the run's when it is about to take its first step.

    It is named by what it says: a launch in the folder of a run that trains gets as far as this before it is refused,
    and must not change what that run starts again with.
    """
    content = text.encode()
    path = run_dir / "nodes" / f"config.{xxhash.xxh3_64_hexdigest(content)}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return path


def _is_later_task(options: LaunchOptions, environment: Mapping[str, str]) -> bool:
    """One that the first may have begun to write before: only that one looks whether the folder is free."""
    return options.launcher == "srun" and environment["SLURM_PROCID"] != "0"


def say(text: str) -> None:
    print(f"moe-train: {text}", file=sys.stderr, flush=True)


def remote_hosts(options: LaunchOptions) -> RemoteHosts | None:
    """The hosts that the workers are started on through ssh; None where there are none."""
    return RemoteHosts(tuple(options.slots)) if options.by_ssh else None


def _new_launch() -> str:
    return uuid.uuid4().hex[:12]


def _latest_step(run_dir: Path) -> int:
    """Of the newest checkpoint; -1 without one."""
    try:
        found = latest(run_dir / CHECKPOINTS)
        return -1 if found is None else int(read_state(found)["step"])
    except (OSError, ValueError):
        return -1


def launch_module(
    module: str,
    arguments: list[str],
    run_dir: Path,
    options: LaunchOptions,
    environment: Mapping[str, str],
    *,
    saves: bool = True,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    launch: str | None = None,
) -> Ending:
    """``python -m module *arguments`` on the processes of ``options`` until its end.

    ``saves``: whether the workers save before they stop on a signal. Launcher "none": one process, nothing around it.
    ``launch``: its name. On other hosts the arguments arrive as one word.
    """
    launch = launch or _new_launch()
    arguments = [*(pack(arguments) if options.by_ssh else arguments), "--status", launch]
    itself = options.launcher == "torchrun" and options.max_restarts > 0
    meeting = MEETING_SECONDS if options.launcher == "torchrun" and options.node_count > 1 else 0.0
    hosts = remote_hosts(options)
    with tempfile.TemporaryDirectory(prefix="moe-train-") as scratch:
        if hosts is not None:
            # Not in the run's folder: it may hold somebody's keys.
            path = Path(scratch) / "environment"
            variables = remote_variables(environment, (Path.home(), Path()))
            path.write_text(environment_file(variables), encoding="utf-8")
            environment = {**environment, "DS_ENV_FILE": str(path), "PDSH_SSH_ARGS_APPEND": ssh_options(environment)}
        if options.launcher == "none":
            line = [sys.executable, "-m", module, *arguments]
        else:
            line = command(options, arguments, scratch=Path(scratch), environment=environment, module=module)
        return supervise(
            line,
            run_dir=run_dir,
            launch=launch,
            environment=environment,
            local_processes=options.local_processes,
            limits=replace(limits, restarts_itself=itself, meeting=meeting),
            saves=saves,
            elsewhere=None if hosts is None else _Elsewhere(hosts, launch, module),
        )


@dataclass(frozen=True)
class _Elsewhere:
    hosts: RemoteHosts
    launch: str
    module: str

    def tell(self) -> None:
        self.hosts.tell(self.launch, self.module)

    def run(self) -> bool:
        return self.hosts.run(self.launch, self.module)

    def sweep(self) -> None:
        self.hosts.sweep([self.launch])


def worker_arguments(
    run_dir: Path,
    resume: str | None,
    config_path: Path | None = None,
    launch: str | None = None,
    init_from: Path | None = None,
    config_text: str | None = None,
) -> list[str]:
    """What every worker is started with. No option may be the beginning of one of DeepSpeed's launcher, whose parser
    would take it for an abbreviation."""
    arguments = ["--run-dir", str(run_dir), "--resume", resume or "none"]
    if config_path is not None:
        arguments += ["--config", str(config_path)]
    if config_text is not None:
        arguments += ["--config-text", config_text]
    if init_from is not None:
        arguments += ["--init-from", str(init_from)]
    return arguments if launch is None else [*arguments, "--status", launch]
