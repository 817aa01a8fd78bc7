"""Train a model. CONFIG is a YAML file or the name of a shipped experiment; key=value changes single options.

The run's folder (runs/<name> unless --run-dir says otherwise) is never overwritten: go on with --resume auto, or choose
another one. Ctrl-C or SIGTERM saves a checkpoint and stops (exit code 130 or 143); a second one kills
(131: not all is saved).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_train.launch.plan import LaunchOptions
    from moe_train.training.run_config import RunConfig

INTERMIXED = True
"""Overrides may stand between options."""


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="path of a YAML file, or name of a shipped experiment")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as train.steps=200 or parts.router=lpr")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<name>")
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="go on from the run's latest checkpoint, or from the checkpoint at PATH"
    )
    parser.add_argument(
        "--init-from",
        type=Path,
        metavar="PATH",
        help="begin with the weights of this run, checkpoint or imported model: step 0, fresh optimizer",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, with its size; start nothing")
    launch = parser.add_argument_group("launch")
    launch.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="worker processes on each node (default: one per accelerator; without any, what the layout needs)",
    )
    launch.add_argument(
        "--launcher",
        choices=("deepspeed", "torchrun", "srun", "none"),
        default="deepspeed",
        help="srun: this command is a task of a Slurm step, one for each accelerator",
    )
    launch.add_argument(
        "--hostfile", type=Path, metavar="H", help="start workers on these hosts through ssh, lines `host slots=N`"
    )
    launch.add_argument(
        "--include", default="", metavar="SPEC", help="of the hostfile only these: host or host:0,2, joined by @"
    )
    launch.add_argument("--exclude", default="", metavar="SPEC", help="of the hostfile all but these")
    launch.add_argument("--no-ssh", action="store_true", help="several nodes: run this command on each of them")
    launch.add_argument("--num-nodes", type=int, default=1, metavar="N")
    launch.add_argument("--node-rank", type=int, default=0, metavar="K", help="this node, from 0")
    launch.add_argument("--master-addr", metavar="A", help="address of node 0")
    launch.add_argument("--master-port", type=int, metavar="P", help="default: a free port; 29500 with several nodes")
    launch.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start a run that fails again from its latest checkpoint, at most N times (default 0)",
    )
    launch.add_argument(
        "--hang-timeout",
        type=float,
        metavar="SECONDS",
        help="when no rank has made any progress for so long, all are killed (default 1800; 0: never). With --launcher "
        "none only where it is given, or restarts are; never with srun",
    )


def run(arguments: argparse.Namespace) -> int:
    from moe_train.launch.devices import accelerator_count
    from moe_train.launch.plan import LaunchOptions
    from moe_train.launch.run import check_launch, default_processes, launch_run
    from moe_train.launch.slurm import worker_variables
    from moe_train.launch.supervise import Limits
    from moe_train.training.run_config import load_run_config
    from moe_train.training.run_folder import default_run_dir

    if arguments.launcher == "srun" and arguments.hang_timeout:
        raise ValueError(
            "--hang-timeout: with --launcher srun nobody watches over the tasks. A collective that waits longer than "
            "parallel.timeout_seconds ends the run, and srun --time=MINUTES the step"
        )
    config = load_run_config(arguments.config, arguments.overrides)
    accelerators = accelerator_count(os.environ)
    processes = arguments.processes
    if processes is None:
        one = arguments.launcher in ("none", "srun") or arguments.hostfile is not None
        processes = 1 if one else default_processes(config, accelerators, max(1, arguments.num_nodes))
    elif arguments.hostfile is not None:
        raise ValueError("--processes: with --hostfile the slots in it say how many there are on each host")
    environment: Mapping[str, str] = os.environ
    if arguments.launcher == "srun":
        environment = {**os.environ, **worker_variables(os.environ, arguments.master_addr, arguments.master_port)}
    options = LaunchOptions(
        launcher=arguments.launcher,
        processes=processes,
        tasks=int(environment["WORLD_SIZE"]) if arguments.launcher == "srun" else 1,
        hostfile=arguments.hostfile,
        include=arguments.include,
        exclude=arguments.exclude,
        no_ssh=arguments.no_ssh,
        nodes=arguments.num_nodes,
        node_rank=arguments.node_rank,
        master_addr=arguments.master_addr,
        master_port=arguments.master_port,
        max_restarts=arguments.max_restarts,
    )
    run_dir = arguments.run_dir or default_run_dir(config)
    if arguments.dry_run:
        check_launch(config, options, accelerators)
        print(describe(config, options, run_dir, "cuda" if accelerators else "cpu"))
        return 0
    return launch_run(
        config,
        run_dir,
        arguments.resume,
        options,
        accelerators=accelerators,
        limits=Limits() if arguments.hang_timeout is None else Limits(hang=arguments.hang_timeout),
        base_environment=environment,
        init_from=arguments.init_from,
        # Somebody must be there to watch it.
        in_process=not arguments.hang_timeout,
    )


def describe(config: RunConfig, options: LaunchOptions, run_dir: Path, device: str) -> str:
    """The text of --dry-run."""
    from moe_train.training.run_config import to_yaml
    from moe_train.training.summary import summary

    return "\n".join([to_yaml(config).rstrip(), "", summary(config, options.world_size, run_dir, device)])
