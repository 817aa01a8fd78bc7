"""One worker process of a run, as launchers start it: ``python -m moe_train.training --run-dir DIR``."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.parallel.passing import may_pass
from moe_train.training.heartbeat import Heartbeat
from moe_train.training.packed import unpack
from moe_train.training.stop import StopRequest
from moe_train.training.worker_status import StatusFile

if TYPE_CHECKING:
    from moe_train.training.run_config import RunConfig

Train = Callable[["RunConfig", Path, "str | None", StopRequest], bool]
"""(configuration, run folder, None | "auto" | path of a checkpoint, stop request) -> True when the run is finished,
False when it has stopped on request, everything saved; raises otherwise."""

WRONG_INPUT = 2
FAILED = 1
BAD_NUMBERS = 3
"""The guard has stopped the run (docs/guard.md)."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m moe_train.training", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to --config")
    parser.add_argument("--config", help="configuration by path or name (default: <run-dir>/config.yaml)")
    parser.add_argument("--config-text", help="the whole configuration, instead of where it lies")
    parser.add_argument("--run-dir", type=Path, help="the run's folder (default with --config: runs/<name>)")
    parser.add_argument("--resume", default="none", metavar="auto|none|PATH", help="checkpoint to start from")
    parser.add_argument("--init-from", type=Path, metavar="PATH", help="run or checkpoint with a new run's weights")
    parser.add_argument("--status", default="", help="name of the launch, for the file that says how it ended")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by launchers, as in the environment")
    return parser.parse_intermixed_args(unpack(sys.argv[1:] if argv is None else argv))


def main(argv: Sequence[str] | None = None, train: Train | None = None, stop: StopRequest | None = None) -> int:
    """Runs this process's share of the training; returns its exit code.

    A clean stop on request is 0 as well: a worker that ended with another code would make launchers kill the ranks that
    are still saving.
    """
    stop = (stop or StopRequest()).install()
    arguments = parse(argv)
    if arguments.status and "TORCHELASTIC_RUN_ID" in os.environ:
        stop.obey_agent()
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    rank = int(os.environ.get("RANK", "0"))
    # Without a run folder there is nobody who reads the status: started by hand.
    launch = arguments.status if arguments.run_dir is not None else ""
    status = StatusFile(arguments.run_dir or Path(), launch, rank)

    # torchrun's count says nothing where the nodes met anew.
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0 or status.is_later

    def work(beat: Heartbeat) -> bool:
        finished = _train(arguments, rank, stop, train, beat, again)
        stop.obeyed = not finished
        return finished

    return run_to_end(work, status)


def run_to_end(work: Callable[[Heartbeat], bool], status: StatusFile) -> int:
    """Does the work of a worker process, says on stderr and in the status file how it ended; returns the exit code.

    ``work`` returns False when it was stopped before its end.
    """
    beat = Heartbeat(status.beat_path, status.status.rank)
    error: str | None = None
    finished = True
    code = 0
    try:
        # Before anything slow is imported: the launching process must know whom to tell to stop.
        status.start()
        beat.start()
        finished = work(beat)
    except KeyboardInterrupt:
        code, error = 130, "interrupted"
    except (ValueError, OSError) as problem:
        if may_pass(problem):  # nothing that this process was given is wrong
            code, error = FAILED, f"{type(problem).__name__}: {problem}"
        else:
            code, error = WRONG_INPUT, str(problem)
        if code == FAILED or os.environ.get("MOE_TRAIN_DEBUG"):
            traceback.print_exc()
    except FloatingPointError as problem:
        code, error = BAD_NUMBERS, str(problem)
    except Exception as problem:
        code, error = FAILED, f"{type(problem).__name__}: {problem}"
        traceback.print_exc()
    beat.close()
    if error is not None:
        print(f"moe-train: rank {status.status.rank}: error: {error}", file=sys.stderr, flush=True)
    status.finish(code, error and error.splitlines()[0], stopped=not finished)
    return code


def _train(
    arguments: argparse.Namespace, rank: int, stop: StopRequest, train: Train | None, beat: Heartbeat, again: bool
) -> bool:
    import yaml

    from moe_train.training.run_config import check, from_dict, load_run_config
    from moe_train.training.run_folder import CONFIG, check_free, check_initial_weights, default_run_dir, holds_run

    resume = None if arguments.resume == "none" else arguments.resume
    if arguments.config_text is not None:
        config = from_dict(yaml.safe_load(arguments.config_text))
    elif arguments.config is None:
        if arguments.run_dir is None:
            raise ValueError("say --run-dir (a folder with config.yaml) or --config")
        config = load_run_config(arguments.run_dir / CONFIG, arguments.overrides)
    else:
        config = load_run_config(arguments.config, arguments.overrides)
    run_dir = arguments.run_dir or default_run_dir(config)
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    if again and holds_run(run_dir):
        resume = "auto"  # torchrun starts its workers again with the arguments of the first start
    if not arguments.status and rank == 0:
        # Started by hand, without the command line that looks first.
        check_free(run_dir, resume)
        if arguments.init_from is not None:
            check_initial_weights(arguments.init_from, resume)
    if train is None:
        from moe_train.training.trainer import train as real_train

        beat.last_collective.watch()
        train = functools.partial(real_train, init_from=arguments.init_from, beat=beat)
    return train(config, run_dir, resume, stop)


def exit_now(code: int) -> None:
    """Ends the process. After a failure without the interpreter's clean-up, which may wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    raise SystemExit(0)
