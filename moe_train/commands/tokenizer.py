"""moe-train tokenizer: train a tokenizer, or look into one."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

_EXAMPLE = """examples:
  moe-train tokenizer train data/demo/corpus --output data/demo/tokenizer.model --vocab-size 8192
  moe-train tokenizer train data/demo/corpus --output chat.model --special-token '<|im_start|>' \\
      --special-token '<|im_end|>'
  moe-train tokenizer inspect data/demo/tokenizer.model --text "def f(x):"
  moe-train tokenizer inspect data/demo/tokenizer.model --on data/demo/corpus"""
_PROOF = 200
"""So many texts decide whether gigatoken encodes alike, as in prepare."""


def register(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train a sentencepiece tokenizer with byte fallback, or show what one holds."
    parser.epilog = _EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    train = actions.add_parser("train", help="train on files of text")
    train.add_argument("source", nargs="+", metavar="SOURCE", help="files, folders or globs: parquet, JSONL, text")
    train.add_argument("--output", required=True, metavar="MODEL", help="file to write; its name ends in .model")
    train.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="number of tokens (default 8192)")
    train.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe", help="(default: bpe)")
    train.add_argument(
        "--special-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help="a token that no text is ever encoded to, as chat templates need; may be given again",
    )
    train.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="X",
        help="share of the characters that get pieces of their own, the rest is spelled in bytes (default 0.9995)",
    )
    train.add_argument("--seed", type=int, default=0, metavar="N", help="another seed takes another sample (default 0)")
    _add_sample(train, default=50_000_000, what="train")

    inspect = actions.add_parser("inspect", help="size, special tokens, bytes per token")
    inspect.add_argument("model", metavar="PATH", help="sentencepiece, Hugging Face or tiktoken")
    inspect.add_argument("--eod-token", metavar="TOKEN", help="special token that ends documents")
    inspect.add_argument("--text", help="show how this text is cut into tokens")
    inspect.add_argument(
        "--on", nargs="+", metavar="SOURCE", help="measure tokens per word and document on these sources"
    )
    _add_sample(inspect, default=10_000_000, what="measure")


def _add_sample(parser: argparse.ArgumentParser, default: int, what: str) -> None:
    parser.add_argument("--text-format", choices=["lines", "document"], help="how plain text is read, as for prepare")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column with the text (default: text)")
    parser.add_argument(
        "--sample-bytes",
        type=int,
        default=default,
        metavar="N",
        help=f"{what} on about so much text (default {default // 1_000_000} MB)",
    )


def run(args: argparse.Namespace) -> int:
    return _train(args) if args.action == "train" else _inspect(args)


def _train(args: argparse.Namespace) -> int:
    from moe_train.data.sources import find_sources, sample_texts
    from moe_train.data.tokenizers import train_sentencepiece

    if not args.output.endswith(".model"):
        raise ValueError(f"the name of a sentencepiece model ends in .model, unlike {args.output}")
    files = find_sources(args.source, args.text_format)
    tokenizer = train_sentencepiece(
        sample_texts(files, args.text_column, args.sample_bytes, args.seed),
        args.output,
        args.vocab_size,
        model_type=args.model_type,
        special_tokens=args.special_token,
        character_coverage=args.character_coverage,
    )
    print(f"{args.output}: {tokenizer.vocab_size} tokens, sha256 {tokenizer.checksum}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from moe_train.data.tokenizers import check_unicode, load_tokenizer

    if args.text:
        check_unicode(args.text, "the text of --text")
    tokenizer = load_tokenizer(args.model, args.eod_token)
    sizes = tokenizer.token_bytes()
    special = sorted((token, spelling) for spelling, token in tokenizer.special_tokens.items())
    longest = sorted(range(tokenizer.vocab_size), key=lambda token: (-sizes[token], token))[:8]
    print(f"tokens             {tokenizer.vocab_size}")
    print(f"sha256             {tokenizer.checksum}")
    print(f"engine             {_engine(tokenizer)}")
    print(f"end of document    {tokenizer.eod_id} {tokenizer.piece(tokenizer.eod_id)}")
    print(f"special tokens     {', '.join(f'{token} {spelling}' for token, spelling in special)}")
    print(f"bytes per token    {sizes[sizes > 0].mean():.2f} on average over the vocabulary, {sizes.max()} at most")
    print(f"longest tokens     {', '.join(repr(tokenizer.piece(token)) for token in longest)}")
    if args.text:
        ids = tokenizer.encode_batch([args.text])[0]
        print(f"text               {len(ids)} tokens, {len(args.text.encode()) / len(ids):.2f} bytes per token")
        print(" ".join(f"{token}:{tokenizer.piece(token)!r}" for token in ids.tolist()))
    if args.on:
        _measure(args, tokenizer)
    return 0


def _measure(args: argparse.Namespace, tokenizer: Any) -> None:
    """Prints the fertility on a sample of the sources, and what encodes them."""
    from moe_train.data.sources import find_sources, sample_texts
    from moe_train.data.tokenizers.fertility import measure
    from moe_train.data.tokenizers.gigatoken_engine import with_fast_engine

    texts = sample_texts(find_sources(args.on, args.text_format), args.text_column, args.sample_bytes)
    first = list(itertools.islice(texts, _PROOF))
    said: list[str] = []
    fast = with_fast_engine(tokenizer, first, said.append)
    found = measure(fast, itertools.chain(first, texts))
    print(f"measured on          {found.documents:,} documents, {found.text_bytes:,} bytes, {found.words:,} words")
    print(f"  bytes per token    {found.bytes_per_token:.3f}")
    print(f"  tokens per word    {found.tokens_per_word:.3f}")
    print(f"  tokens per document  {found.tokens_per_document:.1f}")
    print(f"  tokens that occur  {found.different_tokens:,} of {tokenizer.vocab_size:,}")
    print(
        f"  encoded by         {said[0] if said else f'gigatoken, as {_engine(tokenizer)} does on {len(first)} texts'}"
    )


def _engine(tokenizer: Any) -> str:
    """The library whose ids are right by definition."""
    from moe_train.data.tokenizers.hugging_face import HuggingFaceTokenizer
    from moe_train.data.tokenizers.tiktoken_file import TiktokenTokenizer

    names: dict[type, str] = {HuggingFaceTokenizer: "tokenizers (Hugging Face)", TiktokenTokenizer: "tiktoken"}
    return names.get(type(tokenizer), "sentencepiece")
