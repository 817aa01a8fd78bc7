"""Loss, perplexity and expert load of a trained model on a data set."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

WORKER = "moe_train.training.evaluate"
_EXAMPLE = """examples:
  moe-train evaluate runs/demo
  moe-train evaluate runs/demo --data data/books_validation --checkpoint 200
  moe-train evaluate runs/demo --documents --max-length 1024
  moe-train evaluate runs/demo --trace routing.parquet --against 200"""


def register(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLE
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, for example runs/demo")
    parser.add_argument("--data", metavar="NAME", help="prepared data (default: the run's validation data)")
    parser.add_argument(
        "--checkpoint", default="latest", metavar="latest|STEP|PATH", help="which checkpoint of RUN (default: latest)"
    )
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="processes (default: one per accelerator, or what EP needs)"
    )
    parser.add_argument("--limit-batches", type=positive, metavar="N", help="only N batches per process, spread evenly")
    parser.add_argument(
        "--documents", action="store_true", help="documents one by one, cut and padded, in place of windows of the text"
    )
    parser.add_argument("--max-length", type=positive, metavar="N", help="with --documents: cut at N tokens (512)")
    parser.add_argument(
        "--batch-documents",
        type=positive,
        metavar="N",
        help="with --documents: documents of a batch of the average of batch means (25)",
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the experts of every token to a parquet file")
    parser.add_argument(
        "--against",
        metavar="latest|STEP|PATH",
        help="compare the routing of each token with that of this checkpoint, of this run or (PATH) of another",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE (- for the screen)")


def run(arguments: argparse.Namespace) -> int:
    from moe_train.evaluation.result import evaluation_path, read_evaluation, write_evaluation
    from moe_train.evaluation.table import print_table

    # Without --data the worker takes the validation set, which may be a blend, from the configuration itself.
    data = arguments.data or validation_label(arguments.run)
    # Documents and windows are different measurements of the same data: one does not replace the other.
    kind = "-documents" if arguments.documents else ""
    result_file = evaluation_path(arguments.run, data, arguments.checkpoint, kind)
    unfinished = result_file.with_suffix(".json.unfinished")
    unfinished.unlink(missing_ok=True)
    code = launch(WORKER, worker_arguments(arguments, unfinished), arguments.run, arguments.processes)
    if code == 0 and not unfinished.is_file():
        print(f"the evaluation ended without writing {unfinished}", file=sys.stderr)
        code = 1
    if code != 0:
        print("the evaluation did not finish; see above", file=sys.stderr)
        return code
    evaluation = read_evaluation(unfinished)
    os.replace(unfinished, result_file)  # An earlier result stays until there is a new one.
    if str(arguments.json) == "-":
        print(result_file.read_text(encoding="utf-8"), end="")
        return 0
    if arguments.json is not None:
        write_evaluation(arguments.json, evaluation)
    print_table(evaluation)
    print(f"result: {result_file}")
    if arguments.trace is not None:
        print(f"trace: {arguments.trace}")
    return 0


def worker_arguments(arguments: argparse.Namespace, output: Path) -> list[str]:
    """The command line of the worker, which writes its result to ``--output`` on rank 0."""
    command = ["--run-dir", str(arguments.run), "--checkpoint", str(arguments.checkpoint)]
    if arguments.data is not None:
        command += ["--data", arguments.data]
    if arguments.limit_batches is not None:
        command += ["--limit-batches", str(arguments.limit_batches)]
    for name in ("max_length", "batch_documents"):
        if (value := getattr(arguments, name)) is not None:
            if not arguments.documents:
                raise ValueError(f"--{name.replace('_', '-')} is for evaluation of --documents")
            command += [f"--{name.replace('_', '-')}", str(value)]
    if arguments.trace is not None:
        if arguments.trace.is_dir():
            raise ValueError(f"--trace {arguments.trace} is a folder; give the name of a file")
        command += ["--trace", str(arguments.trace.resolve())]
    if arguments.against is not None:
        command += ["--against", arguments.against]
    if arguments.documents:
        command.append("--documents")
    return [*command, "--output", str(output)]


def validation_label(run_dir: Path) -> str:
    """What the result for the run's validation set says under "data".

    ValueError when the folder is no run or the run has no validation set.
    """
    import yaml

    from moe_train.data.options import label_of

    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no config.yaml")
    config = yaml.safe_load(config_file.read_text(encoding="utf-8")) or {}
    label = label_of((config.get("data") or {}).get("validation"))
    if not label:
        raise ValueError(f"the run {run_dir} has no validation set (data.validation is empty); give one with --data")
    return label


def launch(module: str, worker: list[str], run_dir: Path, processes: int | None) -> int:
    """Runs ``python -m module *worker`` on one process per accelerator, or on as many as the run's layout needs;
    returns the exit status."""
    from moe_train.launch.devices import accelerator_count
    from moe_train.launch.environment import worker_environment
    from moe_train.launch.plan import LaunchOptions
    from moe_train.launch.run import launch_module
    from moe_train.training.run_config import load_run_config

    config = load_run_config(run_dir / "config.yaml", [])
    accelerators = accelerator_count(os.environ)
    options = LaunchOptions(processes=processes or accelerators or config.layout_size)
    environment = worker_environment(options, os.environ, cpu=not accelerators)
    return launch_module(module, worker, run_dir, options, environment, saves=False).code


def positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value
