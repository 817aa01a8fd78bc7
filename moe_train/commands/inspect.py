"""moe-train inspect: what a data set holds, with text and origin."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_EXAMPLE = """examples:
  moe-train inspect data/demo/train
  moe-train inspect data/demo/train --document 3
  moe-train inspect data/demo/train --sample 0 --sequence-length 256 --seed 1"""


def register(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show a data set: its size, one document, or one training sample and the documents in it."
    parser.epilog = _EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", metavar="PREFIX", help="data set, that is PREFIX.bin and PREFIX.idx")
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
    """Where folders (runs, checkpoints) are told apart; so far a folder is only searched for data sets."""
    prefixes = sorted(str(path)[: -len(".idx")] for path in Path(args.path).glob("*.idx"))
    hint = f"; did you mean {' or '.join(prefixes)}?" if prefixes else " and it holds no data set"
    raise ValueError(f"{args.path} is a folder, not the prefix of a data set{hint}")


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
