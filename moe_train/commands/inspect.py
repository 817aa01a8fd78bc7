"""moe-train inspect: what a data set holds, with text and origin; what a run or a checkpoint holds."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

_EXAMPLE = """examples:
  moe-train inspect data/demo/train
  moe-train inspect data/demo/train --document 3
  moe-train inspect data/demo/train --sample 0 --sequence-length 256 --seed 1
  moe-train inspect runs/demo
  moe-train inspect runs/demo --step 100 --rank 0
  moe-train inspect runs/demo/checkpoints/step_00000216"""


def register(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show a data set (its size, a document, a sample), a run (its checkpoints, what a step read) or a checkpoint."
    )
    parser.epilog = _EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", metavar="NAME|RUN|CHECKPOINT", help="name of a data set, or folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--document", type=int, metavar="N", help="text and origin of a document")
    what.add_argument("--sample", type=int, metavar="N", help="text and origin of a training sample")
    what.add_argument("--step", type=int, metavar="K", help="of a run: the documents that this step read (from 1)")
    parser.add_argument("--rank", type=int, metavar="R", help="with --step: of this data-parallel rank alone")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="with --rank: processes of the run, if not those of its last start"
    )
    parser.add_argument("--sequence-length", type=int, default=256, metavar="S", help="of the samples (default 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples' order (default 0)")
    parser.add_argument("--no-shuffle", action="store_true", help="samples in the order of the data set")


def run(args: argparse.Namespace) -> int:
    if args.step is not None:
        return _inspect_step(args)
    if args.rank is not None or args.processes is not None:
        raise ValueError("--rank and --processes belong to --step")
    if Path(args.path).is_dir():
        return _inspect_folder(args)
    from moe_train.data.dataset import open_dataset

    dataset = open_dataset(args.path)
    if args.document is not None:
        if not 0 <= args.document < len(dataset):
            raise ValueError(f"{args.path} has documents 0 to {len(dataset) - 1}, not {args.document}")
        _show(dataset, *dataset.document_span(args.document))
    elif args.sample is not None:
        from moe_train.data.readers import WindowReader
        from moe_train.data.sampling import Sampler

        sampler = Sampler(WindowReader(dataset, args.sequence_length), args.seed, shuffle=not args.no_shuffle)
        [(start, stop)] = sampler.reader.spans(sampler.place(args.sample))
        epoch = args.sample // sampler.samples_per_epoch
        print(f"sample {args.sample}: epoch {epoch}, tokens from {start:,} of the stream")
        _show(dataset, start, stop)
    else:
        _overview(args.path, dataset)
    return 0


def _inspect_step(args: argparse.Namespace) -> int:
    """The documents of a step, from the run's configuration and the data alone."""
    from moe_train.data.dataset import sidecar_stem
    from moe_train.data.domains import documents_path
    from moe_train.data.origins import Origins
    from moe_train.data.provenance import trace
    from moe_train.data.training_set import open_training_set
    from moe_train.training.run_folder import index_folder, load
    from moe_train.training.step_samples import samples_of_step

    config = load(Path(args.path))
    chosen = samples_of_step(config, Path(args.path), args.step, args.rank, args.processes)
    samples = open_training_set(
        config.data,
        seed=config.seed,
        batch_size=config.train.global_batch_size,
        cache=index_folder(config, Path(args.path)),
        once=lambda work: work(),
    )
    origins = {
        name: Origins(sidecar_stem(name)) for name in samples.names if documents_path(sidecar_stem(name)).is_file()
    }
    reader = "" if args.rank is None else f", rank {args.rank}"
    print(f"step {args.step} of {args.path}{reader}: {len(chosen)} samples")
    for index in chosen:
        read = trace(samples, index)
        print(f"sample {index}: {read.name}, epoch {read.epoch}")
        for piece in read.pieces:
            line = f"  document {piece.document}, its tokens {piece.first} to {piece.stop - 1}"
            if read.name in origins:
                line += f": {_origin(origins[read.name], piece.document)}"
            print(line)
    return 0


def _inspect_folder(args: argparse.Namespace) -> int:
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
    hint = f"; did you mean {' or '.join(there)}?" if there else " and it holds no data set, run or checkpoint"
    raise ValueError(f"{args.path} is a folder, not the name of a data set{hint}")


def _show_checkpoint(folder: Path) -> int:
    """Position, layout and tensors, each kind with its number of elements."""
    from moe_train.checkpoint.store import read_state, tensor_shapes

    state, shapes = read_state(folder), tensor_shapes(folder)
    layout = ", ".join(f"{name} {value}" for name, value in state["layout"].items())
    print(f"checkpoint {folder}: step {state['step']:,}, {state['tokens']:,} tokens, written by {layout}")
    for kind in sorted({key.partition(".")[0] for key in shapes}):
        sizes = [math.prod(shape) for key, shape in shapes.items() if key.partition(".")[0] == kind]
        print(f"  {kind}: {len(sizes)} tensors, {sum(sizes):,} elements")
    for key, shape in sorted(shapes.items()):
        if key.startswith("model."):
            print(f"    {key.removeprefix('model.')} {list(shape)}")
    return 0


def _overview(name: str, dataset: Any) -> None:
    from moe_train.data.dataset import sidecar_stem
    from moe_train.data.manifest import manifest_path, read_manifest

    stem = sidecar_stem(name)
    print(f"{name}: {len(dataset):,} documents, {dataset.token_count:,} tokens, stored as {dataset.dtype}")
    if not manifest_path(stem).is_file():
        print("no manifest: not written by moe-train prepare")
        return
    manifest = read_manifest(stem)
    print(f"text               {manifest['text_bytes']:,} bytes")
    if manifest["skipped"]:
        print(f"left out           {', '.join(f'{count:,} {why}' for why, count in manifest['skipped'].items())}")
    print(f"sources            {', '.join(source['name'] for source in manifest['sources'])}")
    tokenizer = manifest["tokenizer"]
    print(f"tokenizer          {tokenizer['file']}, {tokenizer['vocab_size']} tokens, sha256 {tokenizer['checksum']}")
    for name, counts in sorted(manifest["domains"].items()):
        print(f"domain {name or '(none)'}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")


def _show(dataset: Any, start: int, stop: int) -> None:
    """Text of the tokens start <= position < stop, document by document."""
    from moe_train.data.domains import documents_path
    from moe_train.data.manifest import manifest_path, tokenizer_of
    from moe_train.data.origins import Origins
    from moe_train.data.provenance import pieces

    stem = dataset.stem
    tokenizer = tokenizer_of(stem) if manifest_path(stem).is_file() else None
    origins = Origins(stem) if documents_path(stem).is_file() else None
    if start == stop:
        print("(no tokens)")
    for piece in pieces(dataset, start, stop):
        print(f"document {piece.document}, its tokens {piece.first} to {piece.stop - 1}")
        if origins is not None:
            print(f"  {_origin(origins, piece.document)}")
        begin = dataset.document_span(piece.document)[0]
        ids = dataset.read(begin + piece.first, begin + piece.stop).tolist()
        print("-" * 40)
        print(tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids)))
        print("-" * 40)


def _origin(origins: Any, document: int) -> str:
    found = origins[document]
    return f"{found.id or '(no id)'} from {found.source} row {found.row}, domain {found.domain or '(none)'}"
