"""moe-train prepare --corpus: corpora that need no download, as parquet."""

from __future__ import annotations

import argparse

_OPTIONS = {"max_bytes": "stdlib", "seed": "synthetic", "documents": "synthetic"}
"""Option -> the corpus that it is for."""


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus",
        choices=["stdlib", "synthetic"],
        help="write a corpus as parquet instead of reading sources: Python's standard library, or four made-up domains",
    )
    parser.add_argument(
        "--max-bytes", type=int, metavar="N", help="with --corpus stdlib: most text (default 12,000,000)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="with --corpus synthetic: other text (default 0)")
    parser.add_argument(
        "--documents", type=int, metavar="N", help="with --corpus synthetic: of all domains together (default 4000)"
    )


def options(args: argparse.Namespace) -> dict[str, int]:
    """The options of the corpus that were given. ValueError for one of another corpus, or without a corpus."""
    given = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
    for name in given:
        if _OPTIONS[name] != args.corpus:
            raise ValueError(f"--{name.replace('_', '-')} is for --corpus {_OPTIONS[name]} only")
    return given


def write(args: argparse.Namespace) -> int:
    """Writes the corpus and prints what is in it."""
    given = options(args)
    if args.corpus == "stdlib":
        from moe_train.data.corpus import CORPUS_FILE, write_stdlib_corpus

        facts = write_stdlib_corpus(args.output, **given)
        print(f"{args.output}/{CORPUS_FILE}: standard library of {facts['implementation']} {facts['python']}")
    else:
        from moe_train.data.synthetic.corpus import CORPUS_FILE, write_synthetic_corpus

        facts = write_synthetic_corpus(args.output, **given)
        print(f"{args.output}/{CORPUS_FILE}: made-up text of seed {facts['seed']}, sha256 {facts['content_sha256']}")
    for domain, counts in facts["domains"].items():
        print(f"  {domain}: {counts['documents']:,} documents, {counts['bytes']:,} bytes")
    return 0
