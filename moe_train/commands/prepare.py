"""moe-train prepare: text to token files, or the demo corpus to parquet."""

from __future__ import annotations

import argparse
import sys
import time

from moe_train.commands import corpora

_EXAMPLE = """examples:
  moe-train prepare --corpus stdlib --output data/demo/corpus
  moe-train prepare data/demo/corpus --output data/demo --tokenizer data/demo/tokenizer.model

Writes OUTPUT/train.* and OUTPUT/validation.*: Megatron .bin and .idx, provenance, token bytes and a manifest.
Running a finished job again does nothing; changed inputs are refused with the difference."""


def register(parser: argparse.ArgumentParser) -> None:
    parser.description = "Turn text into token files for training and validation."
    parser.epilog = _EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", nargs="*", metavar="SOURCE", help="files, folders or globs: parquet, JSONL, text")
    parser.add_argument(
        "--text-format",
        choices=["lines", "document"],
        help="read .txt and files of other names as a document per line or per file (default for .txt: per file)",
    )
    parser.add_argument(
        "--on-bad",
        choices=["stop", "skip"],
        default="stop",
        help="about rows that cannot be read: bad JSON, invalid UTF-8, no text (default: stop)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="sentencepiece .model, Hugging Face tokenizer.json (or a folder with one), tiktoken rank file",
    )
    parser.add_argument(
        "--eod-token", metavar="TOKEN", help="special token that ends documents (default: what the tokenizer says)"
    )
    corpora.register(parser)
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column with the text (default: text)")
    parser.add_argument("--id-column", default="id", metavar="NAME", help="column that names a document (default: id)")
    parser.add_argument("--domain-column", default="dump", metavar="NAME", help="column with a label (default: dump)")
    parser.add_argument(
        "--split-column", default="url", metavar="NAME", help="rows equal here stay on one side (default: url)"
    )
    parser.add_argument(
        "--validation-fraction", type=float, default=0.05, metavar="X", help="for validation, 0 for none (default 0.05)"
    )
    parser.add_argument("--split-seed", type=int, default=0, metavar="N", help="another seed gives another split")


def run(args: argparse.Namespace) -> int:
    if args.corpus is not None:
        return _corpus(args)
    corpora.options(args)
    if not args.source or args.tokenizer is None:
        raise ValueError("prepare needs a SOURCE and --tokenizer MODEL, or --corpus stdlib; --help says more")
    from moe_train.data.prepare import PrepareOptions, prepare
    from moe_train.data.sources import find_sources, first_texts
    from moe_train.data.tokenizers import load_tokenizer
    from moe_train.data.tokenizers.gigatoken_engine import with_fast_engine

    options = PrepareOptions(
        text_column=args.text_column,
        id_column=args.id_column,
        domain_column=args.domain_column,
        split_column=args.split_column,
        validation_fraction=args.validation_fraction,
        split_seed=args.split_seed,
        on_bad=args.on_bad,
    )
    tokenizer = with_fast_engine(
        load_tokenizer(args.tokenizer, args.eod_token),
        first_texts(find_sources(args.source, args.text_format), args.text_column, 200),
        lambda text: print(text, file=sys.stderr, flush=True),
    )
    manifests = prepare(args.source, args.output, tokenizer, options, _Reporter(), args.text_format)
    for split, manifest in manifests.items():
        skipped = ", ".join(f"{count} {reason}" for reason, count in manifest["skipped"].items() if count)
        print(
            f"{args.output}/{split}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
            f"{manifest['text_bytes']:,} bytes of text, unigram entropy {manifest['unigram_entropy_nats']:.3f} nats"
            + (f"; skipped in all: {skipped}" if skipped else "")
        )
        for problem in manifest["problems"][:3]:
            print(f"  left out: {problem['file']}, row {problem['row']}: {problem['reason']}")
        if manifest["inexact_documents"]:
            print(
                f"  note: in {manifest['inexact_documents']:,} documents the bytes of the tokens do not add up to the "
                "text (the tokenizer normalises); bits per byte are approximate"
            )
    return 0


def _corpus(args: argparse.Namespace) -> int:
    if args.source or args.tokenizer is not None:
        raise ValueError(
            "--corpus writes parquet only: leave out SOURCE and --tokenizer, prepare that folder afterwards"
        )
    return corpora.write(args)


class _Reporter:
    """Prints a line to stderr every few seconds."""

    def __init__(self, every_seconds: float = 2.0) -> None:
        self._every = every_seconds
        self._next = time.monotonic() + every_seconds

    def __call__(self, progress) -> None:  # type: ignore[no-untyped-def]  # Progress; importing it here would be slow
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._every
        seconds = max(progress.seconds, 1e-9)
        print(
            f"file {progress.files}/{progress.total_files}  {progress.documents:,} documents  "
            f"{progress.tokens:,} tokens  "
            f"{progress.text_bytes / 1e6 / seconds:.1f} MB/s  {progress.tokens / seconds:,.0f} tokens/s",
            file=sys.stderr,
            flush=True,
        )
