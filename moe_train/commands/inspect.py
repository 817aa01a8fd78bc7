"""moe-train inspect: what a data set holds, with text and origin; what a run or a checkpoint holds."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_train.training.step_samples import StepSamples

_EXAMPLE = """examples:
  moe-train inspect data/demo/train
  moe-train inspect data/demo/train --document 3
  moe-train inspect data/demo/train --sample 0 --sequence-length 256 --seed 1
  moe-train inspect data/demo/train --sample 0 --sampler documents --pack-documents
  moe-train inspect runs/demo
  moe-train inspect runs/demo --step 100 --rank 0
  moe-train inspect runs/demo --sample 812
  moe-train inspect runs/demo/checkpoints/step_00000216"""


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
        args.path = _data_name(args.path)
    if given and (folder or args.sample is None):
        raise ValueError(f"{', '.join(given)}: only for --sample of a data set; a run's own configuration says it")
    if args.step is not None:
        _check_run(args.path, f"--step {args.step}")
        return _inspect_step(args)
    if folder and args.sample is not None:
        _check_run(args.path, f"--sample {args.sample}")
        return _inspect_run_sample(args)
    if folder and args.document is not None:
        raise ValueError(f"{args.path} is a folder; --document belongs to a data set, which is named by its prefix")
    if folder:
        return _inspect_folder(args)
    from moe_train.data.dataset import data_prefixes, open_dataset

    try:
        data_prefixes(args.path)
    except FileNotFoundError as error:
        if Path(args.path).exists():
            raise
        raise FileNotFoundError(f"{error}; nor is there a folder {args.path} of a run or a checkpoint") from None
    if args.sample is not None:
        return _inspect_sample(args)
    dataset = open_dataset(args.path)
    if args.document is not None:
        if not 0 <= args.document < len(dataset):
            raise ValueError(f"{args.path} has documents 0 to {len(dataset) - 1}, not {args.document}")
        _show(dataset, [dataset.document_span(args.document)])
    else:
        _overview(args.path, dataset)
    return 0


def _data_name(path: str) -> str:
    """The name of a data set, also where one of its files was named."""
    from moe_train.data.indexed import idx_path

    for ending in (".idx", ".bin"):
        if path.endswith(ending) and not idx_path(path).is_file():
            return path.removesuffix(ending)
    return path


def _check_run(path: str, asked: str) -> None:
    """ValueError where the path is no folder of a run; the message says what it is, and where to ask."""
    from moe_train.data.dataset import data_prefixes, datasets_in
    from moe_train.training.run_folder import CONFIG, holds_run

    folder = Path(path)
    if (folder / CONFIG).is_file():
        return
    parents = [*folder.parents, *folder.resolve().parents]
    run = next((parent for parent in parents if (parent / CONFIG).is_file() and holds_run(parent)), None)
    if folder.is_dir() and run is not None:
        what = "a checkpoint" if (folder / "state.json").is_file() else "a folder of a run"
        raise ValueError(f"{path} is {what}, not the run itself: ask the run by moe-train inspect {run} {asked}")
    if folder.is_dir():
        what = "is a checkpoint, not a run" if (folder / "state.json").is_file() else "is no folder of a run"
        there = datasets_in(folder)
        hint = f"; did you mean {' or '.join(there)}?" if there and asked.startswith("--sample") else ""
        raise ValueError(f"{path} {what} (it holds no {CONFIG}), and {asked} is asked of one{hint}")
    try:
        data_prefixes(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no folder {path}; {asked} is asked of the folder of a run, for example runs/demo"
        ) from None
    raise ValueError(
        f"{path} is a data set, not the folder of a run, which {asked} is asked of; of a data set inspect shows "
        "--document N and --sample N"
    )


def _inspect_sample(args: argparse.Namespace) -> int:
    """A sample of a data set as a run on it alone would read it."""
    import tempfile

    from moe_train.data.members import open_reader
    from moe_train.data.options import DataOptions
    from moe_train.data.sampling import Sampler

    if args.pack_documents and args.sampler != "documents":
        raise ValueError("--pack-documents belongs to --sampler documents")
    options = DataOptions(
        sequence_length=256 if args.sequence_length is None else args.sequence_length,
        sampler=args.sampler or "packed",
        pack_documents=args.pack_documents,
    )
    # Where there is an index of samples it is written anew: whose cache could be meant is not known here.
    with tempfile.TemporaryDirectory() as cache:
        reader = open_reader(args.path, options, cache=Path(cache), once=lambda work: work())
        sampler = Sampler(reader, args.seed or 0, shuffle=not args.no_shuffle)
        spans = reader.spans(sampler.place(args.sample))
    epoch = args.sample // sampler.samples_per_epoch
    print(f"sample {args.sample}: epoch {epoch}, tokens from {spans[0][0]:,} of the stream")
    _show(reader.dataset, spans)
    return 0


def _inspect_run_sample(args: argparse.Namespace) -> int:
    """Text of a sample of a run."""
    from moe_train.data.provenance import trace
    from moe_train.training.step_samples import open_samples, samples_of_step, step_of_sample

    run = Path(args.path)
    found = samples_of_step(run, step_of_sample(run, args.sample))
    with open_samples(run, found) as samples:
        read = trace(samples, args.sample)
        print(f"sample {read.index}: {read.name}, epoch {read.epoch}, read by step {found.step}{_taken_by(run, found)}")
        dataset = samples.samplers[samples.names.index(read.name)].reader.dataset
        begins = [dataset.document_span(piece.document)[0] for piece in read.pieces]
        _show(dataset, [(begin + p.first, begin + p.stop) for begin, p in zip(begins, read.pieces, strict=True)])
    return 0


def _inspect_step(args: argparse.Namespace) -> int:
    """The documents of a step, from the run's record of its starts and the data alone."""
    from moe_train.data.dataset import sidecar_stem
    from moe_train.data.domains import documents_path
    from moe_train.data.origins import Origins
    from moe_train.data.provenance import trace
    from moe_train.training.step_samples import open_samples, samples_of_step

    run = Path(args.path)
    found = samples_of_step(run, args.step, args.rank)
    with open_samples(run, found) as samples:
        origins = {
            name: Origins(sidecar_stem(name)) for name in samples.names if documents_path(sidecar_stem(name)).is_file()
        }
        reader = "" if args.rank is None else f", rank {args.rank} of {found.ranks}"
        print(f"step {args.step} of {args.path}{reader}{_taken_by(run, found)}: {len(found.indices)} samples")
        for index in found.indices:
            read = trace(samples, index)
            print(f"sample {index}: {read.name}, epoch {read.epoch}")
            for piece in read.pieces:
                line = f"  document {piece.document}, its tokens {piece.first} to {piece.stop - 1}"
                if read.name in origins:
                    line += f": {_origin(origins[read.name], piece.document)}"
                print(line)
    return 0


def _taken_by(run: Path, found: StepSamples) -> str:
    other = Path(found.stretch.run)
    return "" if other == run.resolve() else f", taken by {other}"


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
    hint = f"; did you mean {' or '.join(there)}?" if there else ", and it holds no data set, run or checkpoint"
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
        print("no manifest: not written by moe-train prepare, so text, sources, tokenizer and domains are not known")
        return
    manifest = read_manifest(stem)
    tokenizer = manifest.get("tokenizer", {})
    sources = [str(source.get("name")) for source in manifest.get("sources", [])]
    facts = {
        "text": f"{manifest['text_bytes']:,} bytes" if "text_bytes" in manifest else None,
        "left out": ", ".join(f"{count:,} {why}" for why, count in manifest.get("skipped", {}).items()),
        "sources": ", ".join(sources) if "sources" in manifest else None,
        "tokenizer": ", ".join(
            text.format(tokenizer[key])
            for key, text in (("file", "{}"), ("vocab_size", "{} tokens"), ("checksum", "sha256 {}"))
            if key in tokenizer
        )
        or None,
    }
    for label, value in facts.items():
        if value != "":
            print(f"{label:18} {'(the manifest does not say)' if value is None else value}")
    for domain, counts in sorted(manifest.get("domains", {}).items()):
        known = [f"{counts[what]:,} {what}" for what in ("documents", "tokens") if what in counts]
        print(f"domain {domain or '(none)'}: {', '.join(known)}")


def _show(dataset: Any, spans: list[tuple[int, int]]) -> None:
    """Text of the tokens of all spans start <= position < stop, document by document."""
    from moe_train.data.domains import documents_path
    from moe_train.data.manifest import manifest_path, tokenizer_of
    from moe_train.data.origins import Origins
    from moe_train.data.provenance import pieces

    stem = dataset.stem
    tokenizer = tokenizer_of(stem) if manifest_path(stem).is_file() else None
    origins = Origins(stem) if documents_path(stem).is_file() else None
    found = [piece for span in spans for piece in pieces(dataset, *span)]
    if not found:
        print("(no tokens)")
    for piece in found:
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
