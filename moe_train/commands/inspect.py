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
  moe-train inspect runs/demo/checkpoints/step_00000216"""


def register(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show a data set (its size, a document, a training sample), a run or a checkpoint."
    parser.epilog = _EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", metavar="PREFIX|RUN|CHECKPOINT", help="data set (PREFIX.bin and .idx) or folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--document", type=int, metavar="N", help="text and origin of a document")
    what.add_argument("--sample", type=int, metavar="N", help="text and origin of a training sample")
    parser.add_argument("--sequence-length", type=int, default=256, metavar="S", help="of the samples (default 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples' order (default 0)")
    parser.add_argument("--no-shuffle", action="store_true", help="samples in the order of the data set")


def run(args: argparse.Namespace) -> int:
    if Path(args.path).is_dir():
        return _inspect_folder(args)
    from moe_train.data.indexed import IndexedDataset

    dataset = IndexedDataset(args.path)
    if args.document is not None:
        if not 0 <= args.document < len(dataset):
            raise ValueError(f"{args.path} has documents 0 to {len(dataset) - 1}, not {args.document}")
        start, stop = dataset.document_span(args.document)
        _show(args.path, dataset, start, stop)
    elif args.sample is not None:
        from moe_train.data.sampling import PackedSampler

        sampler = PackedSampler(dataset, args.sequence_length, args.seed, shuffle=not args.no_shuffle)
        start = sampler.start(args.sample)
        epoch = args.sample // sampler.samples_per_epoch
        print(f"sample {args.sample}: epoch {epoch}, tokens from {start:,} of the stream")
        _show(args.path, dataset, start, start + args.sequence_length + 1)
    else:
        _overview(args.path, dataset)
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
    prefixes = sorted(str(path)[: -len(".idx")] for path in folder.glob("*.idx"))
    hint = f"; did you mean {' or '.join(prefixes)}?" if prefixes else " and it holds no data set, run or checkpoint"
    raise ValueError(f"{args.path} is a folder, not the prefix of a data set{hint}")


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


def _overview(prefix: str, dataset: Any) -> None:
    from moe_train.data.manifest import manifest_path, read_manifest

    print(f"{prefix}: {len(dataset):,} documents, {dataset.token_count:,} tokens, stored as {dataset.dtype}")
    if not manifest_path(prefix).is_file():
        print("no manifest: not written by moe-train prepare")
        return
    manifest = read_manifest(prefix)
    print(f"text               {manifest['text_bytes']:,} bytes")
    print(f"unigram entropy    {manifest['unigram_entropy_nats']:.3f} nats per token")
    print(f"sources            {', '.join(source['name'] for source in manifest['sources'])}")
    tokenizer = manifest["tokenizer"]
    print(f"tokenizer          {tokenizer['file']}, {tokenizer['vocab_size']} tokens, sha256 {tokenizer['checksum']}")
    for name, counts in sorted(manifest["domains"].items()):
        print(f"domain {name or '(none)'}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")


def _show(prefix: str, dataset: Any, start: int, stop: int) -> None:
    """Text of the tokens start <= position < stop, document by document."""
    from moe_train.data.domains import documents_path
    from moe_train.data.manifest import manifest_path, tokenizer_of

    tokenizer = tokenizer_of(prefix) if manifest_path(prefix).is_file() else None
    origins = _origins(prefix) if documents_path(prefix).is_file() else None
    if start == stop:
        print("(no tokens)")
    while start < stop:
        document = dataset.document_at(start)
        first, end = dataset.document_span(document)
        end = min(end, stop)
        print(f"document {document}, its tokens {start - first} to {end - first - 1}")
        if origins is not None:
            facts = origins.slice(document, 1).to_pylist()[0]
            print(f"  {facts['id']} from {facts['source']} row {facts['row']}, domain {facts['domain'] or '(none)'}")
        ids = dataset.tokens[start:end].tolist()
        print("-" * 40)
        print(tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids)))
        print("-" * 40)
        start = end


def _origins(prefix: str) -> Any:
    import pyarrow.parquet as pq

    from moe_train.data.domains import documents_path

    return pq.read_table(documents_path(prefix), columns=["source", "row", "id", "domain"], memory_map=True)
