"""moe-train prepare: text to token files, or a corpus of our own to parquet."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from moe_train.commands import corpora, instruction
from moe_train.commands.stopping import can_be_stopped

_EXAMPLE = """examples:
  moe-train prepare --corpus stdlib --output data/demo/corpus
  moe-train prepare books/ --output data/books --tokenizer data/books.model --validation-fraction 0.05
  moe-train prepare 'fineweb/*.parquet' --output data/fineweb --tokenizer gpt2/ --workers 16
  moe-train prepare 'c4/c4-train.*.json.gz' --output data/c4 --tokenizer gpt2/ --task $SLURM_ARRAY_TASK_ID/32
  moe-train prepare 'c4/c4-train.*.json.gz' --output data/c4 --tokenizer gpt2/ --merge

Writes PREFIX_text_document.bin and .idx as Megatron names them (PREFIX_train_text_document, ... with a split),
provenance, token bytes and a manifest. The same command again goes on where an unfinished job was, also after
Ctrl-C or SIGTERM (exit code 130 or 143), and does nothing where it is finished; changed inputs or options are refused
with the difference."""


def register(parser: argparse.ArgumentParser) -> None:
    parser.description = "Turn text into token files."
    parser.epilog = _EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "source",
        nargs="*",
        metavar="SOURCE",
        help="files, folders, globs or URLs (s3://, hf://): parquet, JSONL, text, also .gz and .zst; .npy of token ids",
    )
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="what the files' names begin with; a folder with --corpus"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="sentencepiece .model, Hugging Face tokenizer.json (or a folder with one), tiktoken rank file",
    )
    corpora.register(parser)
    instruction.register(parser)
    _reading(parser.add_argument_group("reading"))
    _choice(parser.add_argument_group("which documents"))
    _writing(parser.add_argument_group("writing"))
    _work(parser.add_argument_group("work (the result does not depend on it)"))


def _reading(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--text-format",
        choices=["lines", "document"],
        help="read .txt and files of other names as a document per line or per file (default for .txt: per file)",
    )
    group.add_argument(
        "--on-bad",
        choices=["stop", "skip"],
        default="stop",
        help="about rows that cannot be read: bad JSON, invalid UTF-8, no text, a damaged page (default: stop)",
    )
    group.add_argument(
        "--stop-on",
        action="append",
        default=[],
        choices=["null", "empty", "too short", "too long"],
        help="stop at such a document in place of leaving it out; may be repeated",
    )
    group.add_argument("--text-column", default="text", metavar="NAME", help="column with the text (default: text)")
    group.add_argument("--id-column", default="id", metavar="NAME", help="column that names a document (default: id)")
    group.add_argument("--domain-column", default="dump", metavar="NAME", help="column with a label (default: dump)")


def _choice(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--min-language-score", type=float, metavar="X", help="of column language_score")
    group.add_argument("--dump", action="append", default=[], metavar="NAME", help="only of this dump; may be repeated")
    group.add_argument("--url-include", default="", metavar="REGEX", help="only documents whose url matches (RE2)")
    group.add_argument("--url-exclude", default="", metavar="REGEX", help="no documents whose url matches")
    group.add_argument("--min-chars", type=int, default=0, metavar="N", help="no shorter texts")
    group.add_argument("--max-chars", type=int, metavar="N", help="no longer texts")
    group.add_argument(
        "--sample", type=float, default=1.0, metavar="X", help="share of the documents, by hash of the id"
    )
    group.add_argument("--sample-seed", type=int, default=0, metavar="N", help="another seed takes other documents")
    group.add_argument("--max-documents", type=int, metavar="N", help="the first N in source order")
    group.add_argument("--max-tokens", type=int, metavar="N", help="the first documents that have no more together")
    group.add_argument(
        "--validation-fraction",
        type=float,
        default=0.0,
        metavar="X",
        help="for validation, by hash (default: no split)",
    )
    group.add_argument("--test-fraction", type=float, default=0.0, metavar="X", help="for a test set, by hash")
    group.add_argument(
        "--split-column",
        default="url",
        metavar="NAME",
        help="rows equal here stay on one side (default: url; where it is missing the id, else the text)",
    )
    group.add_argument("--split-seed", type=int, default=0, metavar="N", help="another seed gives another split")
    group.add_argument(
        "--split-from", default="", metavar="NAME", help="column that says train, validation or test by itself"
    )


def _writing(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--eod-token", metavar="TOKEN", help="special token that ends documents (default: what the tokenizer says)"
    )
    group.add_argument("--no-eod", action="store_true", help="do not end documents with a token")
    group.add_argument(
        "--shard-tokens", type=int, metavar="N", help="several pairs of files with at most N tokens each"
    )


def _work(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workers", type=int, default=_processors(), metavar="N", help="processes (default: %(default)s, one per core)"
    )
    group.add_argument(
        "--executor", choices=["local", "ray"], default="local", help="local processes, or those of a Ray cluster"
    )
    group.add_argument("--task", type=_task, metavar="I/N", help="only the I-th of N parts of the work, from 1")
    group.add_argument("--merge", action="store_true", help="put together what all tasks have done")


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _task(text: str) -> tuple[int, int]:
    number, mark, count = text.partition("/")
    if not (mark and number.isdigit() and count.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, as 3/8")
    return int(number), int(count)


def run(args: argparse.Namespace) -> int:
    if args.corpus is not None:
        return _corpus(args)
    corpora.options(args)
    with can_be_stopped("; the same command again goes on where it was"):
        return _tokens(args)


def _tokens(args: argparse.Namespace) -> int:
    if not args.source or args.tokenizer is None:
        raise ValueError(
            "prepare needs a SOURCE and --tokenizer MODEL, or --corpus stdlib or synthetic; --help says more"
        )
    from moe_train.commands.prepare_progress import reporter
    from moe_train.data.prepare import How, PrepareOptions, prepare
    from moe_train.data.prepare.names import work_folder
    from moe_train.data.sources import find_sources, first_texts
    from moe_train.data.tokenizers import load_tokenizer
    from moe_train.data.tokenizers.gigatoken_engine import with_fast_engine

    options = PrepareOptions(
        text_column=args.text_column,
        id_column=args.id_column,
        domain_column=args.domain_column,
        split_column=args.split_column,
        split_from=args.split_from,
        validation_fraction=args.validation_fraction,
        test_fraction=args.test_fraction,
        split_seed=args.split_seed,
        append_eod=not args.no_eod,
        min_language_score=args.min_language_score,
        dumps=tuple(args.dump),
        url_include=args.url_include,
        url_exclude=args.url_exclude,
        min_chars=args.min_chars,
        max_chars=args.max_chars,
        sample=args.sample,
        sample_seed=args.sample_seed,
        max_documents=args.max_documents,
        max_tokens=args.max_tokens,
        shard_tokens=args.shard_tokens,
        on_bad=args.on_bad,
        stop_on=tuple(args.stop_on),
        instruction=instruction.options(args),
    )
    how = How(workers=args.workers, executor=args.executor, task=args.task, merge_only=args.merge)
    reference = load_tokenizer(args.tokenizer, args.eod_token)
    files = find_sources(args.source, args.text_format)
    tokenizer = with_fast_engine(reference, first_texts(files, options.content_columns, 200), _say)
    before = _written(args.output, options.splits)
    with reporter() as report:
        manifests = prepare(files, args.output, tokenizer, options, how, report)
    # A task at work beside a manifest (where files of the result are lost) leaves what it has done.
    worked = args.task is not None and work_folder(args.output).exists()
    if before and before == _written(args.output, options.splits) and not worked:
        print("nothing was done: the result of this job is there already")
    elif args.task is not None:
        print(
            f"task {args.task[0]} of {args.task[1]} is done; when all are, the same command with --merge ends the job"
        )
    for split, manifest in manifests.items():
        _show(args.output, split, manifest)
    for manifest in list(manifests.values())[:1]:
        _show_problems(manifest)
    return 0


def _written(prefix: str, splits: Sequence[str]) -> list[tuple[int, int]]:
    """Which manifests there are, told apart from later ones; nothing where one is missing."""
    from moe_train.data.manifest import manifest_path
    from moe_train.data.prepare.names import stem_of

    paths = [manifest_path(stem_of(prefix, split)) for split in splits]
    if not all(path.is_file() for path in paths):
        return []
    return [(found.st_ino, found.st_mtime_ns) for found in (path.stat() for path in paths)]


def _show(prefix: str, split: str, manifest: dict[str, Any]) -> None:
    from moe_train.data.prepare.names import stem_of

    shards = len(manifest["shards"])
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["skipped"].items())
    print(
        f"{stem_of(prefix, split)}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"{manifest['text_bytes']:,} bytes of text"
        + (f", {shards} shards" if shards > 1 else "")
        + (f"; left out in all: {skipped}" if skipped else "")
    )


def _show_problems(manifest: dict[str, Any]) -> None:
    """The first rows that could not be read; they are of the whole job."""
    from moe_train.data.prepare.options import STOPPABLE

    unreadable = [problem for problem in manifest["problems"] if problem["reason"] not in STOPPABLE]
    for problem in unreadable[:3]:
        rows = f"row {problem['row']}" if problem["rows"] == 1 else f"{problem['rows']} rows from {problem['row']}"
        print(f"  left out: {problem['file']}, {rows}: {problem['reason']}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _corpus(args: argparse.Namespace) -> int:
    if args.source or args.tokenizer is not None:
        raise ValueError(
            "--corpus writes parquet only: leave out SOURCE and --tokenizer, prepare that folder afterwards"
        )
    return corpora.write(args)
