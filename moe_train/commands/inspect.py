"""moe-train inspect: what a data set holds, with text and origin; what a run or a checkpoint holds."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from moe_train.commands.inspect_data import data_name, show_overview, show_sample, show_text
from moe_train.commands.inspect_run import check_run, show_run_sample, show_step
from moe_train.commands.verify import verify

_EXAMPLE = """examples:
  moe-train inspect data/demo/train
  moe-train inspect data/demo/train --document 3
  moe-train inspect data/demo/train --sample 0 --sequence-length 256 --seed 1
  moe-train inspect data/demo/train --sample 0 --sampler documents --pack-documents
  moe-train inspect data/demo/train --token-counts counts.json
  moe-train inspect runs/demo
  moe-train inspect runs/demo --step 100 --rank 0
  moe-train inspect runs/demo --sample 812
  moe-train inspect runs/demo/checkpoints/step_00000216
  moe-train inspect runs/demo --verify            reads every checkpoint and compares it with its checksums"""


def register(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show a data set (its size, a document, a sample), a run (its checkpoints, what a step or a sample of it read) "
        "or a checkpoint."
    )
    parser.epilog = _EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", metavar="NAME|RUN|CHECKPOINT", help="name of a data set, or folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--document", type=int, metavar="N", help="of a data set: text and origin of a document")
    what.add_argument("--sample", type=int, metavar="N", help="text and origin of a sample of a data set or a run")
    what.add_argument("--step", type=int, metavar="K", help="of a run: the documents that this step read (from 1)")
    what.add_argument(
        "--token-counts", metavar="FILE", help="of a data set: write how often each token id occurs (for gate hash)"
    )
    what.add_argument(
        "--verify", action="store_true", help="of a run or a checkpoint: compare all files with their checksums"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="with --step: of this data-parallel rank alone")
    cut = parser.add_argument_group(
        "samples of a data set", "what the run's configuration says under data and seed; with a RUN it says so itself"
    )
    cut.add_argument("--sequence-length", type=int, metavar="S", help="default 256")
    cut.add_argument("--sampler", choices=("packed", "documents"), help="default packed")
    cut.add_argument("--pack-documents", action="store_true", help="with --sampler documents: whole ones per sequence")
    cut.add_argument("--seed", type=int, metavar="N", help="of the samples' order (default 0)")
    cut.add_argument("--no-shuffle", action="store_true", help="samples in the order of the data set")


def run(args: argparse.Namespace) -> int:
    if args.rank is not None and args.step is None:
        raise ValueError("--rank belongs to --step")
    cuts = ("sequence_length", "sampler", "pack_documents", "seed", "no_shuffle")
    given = [f"--{name.replace('_', '-')}" for name in cuts if getattr(args, name) not in (None, False)]
    folder = Path(args.path).is_dir()
    if not folder:
        args.path = data_name(args.path)
    if given and (folder or args.sample is None):
        raise ValueError(f"{', '.join(given)}: only for --sample of a data set; a run's own configuration says it")
    if args.step is not None:
        check_run(args.path, f"--step {args.step}")
        return show_step(args)
    if folder and args.sample is not None:
        check_run(args.path, f"--sample {args.sample}")
        return show_run_sample(args)
    if args.verify and not folder:
        raise ValueError(f"--verify is for the folder of a run or a checkpoint, which {args.path} is not")
    if args.verify:
        return verify(Path(args.path))
    if folder and args.document is not None:
        raise ValueError(f"{args.path} is a folder; --document belongs to a data set, which is named by its prefix")
    if folder and args.token_counts is not None:
        raise ValueError(f"{args.path} is a folder; --token-counts belongs to a data set, which is named by its prefix")
    if folder:
        return _show_folder(args)
    from moe_train.data.dataset import data_prefixes, open_dataset

    try:
        data_prefixes(args.path)
    except FileNotFoundError as error:
        if Path(args.path).exists():
            raise
        raise FileNotFoundError(f"{error}; nor is there a folder {args.path} of a run or a checkpoint") from None
    if args.sample is not None:
        return show_sample(args)
    dataset = open_dataset(args.path)
    if args.document is not None:
        if not 0 <= args.document < len(dataset):
            raise ValueError(f"{args.path} has documents 0 to {len(dataset) - 1}, not {args.document}")
        show_text(dataset, [dataset.document_span(args.document)])
    elif args.token_counts is not None:
        from moe_train.data.token_counts import write_token_counts

        found = write_token_counts(dataset, Path(args.token_counts))
        print(f"{args.token_counts}: counts of {found:,} token ids that occur among {dataset.token_count:,} tokens")
    else:
        show_overview(args.path, dataset)
    return 0


def _show_folder(args: argparse.Namespace) -> int:
    """A run, a checkpoint, or a folder that is neither."""
    folder = Path(args.path)
    if (folder / "state.json").is_file():
        return _show_checkpoint(folder)
    checkpoints = sorted(folder.glob("checkpoints/step_????????"))
    if (folder / "config.yaml").is_file():
        print(f"run {folder}: {len(checkpoints)} checkpoints")
        pointer = folder / "checkpoints" / "latest"
        newest = pointer.read_text().strip() if pointer.is_file() else ""
        for checkpoint in checkpoints:
            print(f"  {checkpoint}{' (latest)' if checkpoint.name == newest else ''}")
        return _show_checkpoint(checkpoints[-1]) if checkpoints else 0
    from moe_train.data.dataset import datasets_in

    there = datasets_in(folder)
    hint = f"; did you mean {' or '.join(there)}?" if there else ", and it holds no data set, run or checkpoint"
    raise ValueError(f"{args.path} is a folder, not the name of a data set{hint}")


def _show_checkpoint(folder: Path) -> int:
    """Position, layout and tensors, each kind with its number of elements."""
    from moe_train.checkpoint.index import read_index
    from moe_train.checkpoint.state import read_state

    state, shapes = read_state(folder), read_index(folder).shapes
    layout = ", ".join(f"{name} {value}" for name, value in state["layout"].items())
    print(f"checkpoint {folder}: step {state['step']:,}, {state['tokens']:,} tokens, written by {layout}")
    if versions := {name: version for name, version in state.get("versions", {}).items() if version}:
        print("  by " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    for kind in sorted({key.partition(".")[0] for key in shapes}):
        sizes = [math.prod(shape) for key, shape in shapes.items() if key.partition(".")[0] == kind]
        print(f"  {kind}: {len(sizes)} tensors, {sum(sizes):,} elements")
    for key, shape in sorted(shapes.items()):
        if key.startswith("model."):
            print(f"    {key.removeprefix('model.')} {list(shape)}")
    return 0
