"""moe-train tokenizer: train a tokenizer, or look into one."""

from __future__ import annotations

import argparse

_EXAMPLE = """examples:
  moe-train tokenizer train data/demo/corpus --output data/demo/tokenizer.model --vocab-size 8192
  moe-train tokenizer inspect data/demo/tokenizer.model --text "def f(x):" """


def register(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train a sentencepiece BPE tokenizer with byte fallback, or show what one holds."
    parser.epilog = _EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    train = actions.add_parser("train", help="train on files of text")
    train.add_argument("source", nargs="+", metavar="SOURCE", help="files, folders or globs: parquet, JSONL, text")
    train.add_argument("--text-format", choices=["lines", "document"], help="how plain text is read, as for prepare")
    train.add_argument("--output", required=True, metavar="MODEL", help="file to write; its name ends in .model")
    train.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="number of tokens (default 8192)")
    train.add_argument("--text-column", default="text", metavar="NAME", help="column with the text (default: text)")
    train.add_argument(
        "--sample-bytes", type=int, default=50_000_000, metavar="N", help="train on about so much text (default 50 MB)"
    )

    inspect = actions.add_parser("inspect", help="size, special tokens, bytes per token")
    inspect.add_argument("model", metavar="PATH", help="sentencepiece, Hugging Face or tiktoken")
    inspect.add_argument("--eod-token", metavar="TOKEN", help="special token that ends documents")
    inspect.add_argument("--text", help="show how this text is cut into tokens")


def run(args: argparse.Namespace) -> int:
    return _train(args) if args.action == "train" else _inspect(args)


def _train(args: argparse.Namespace) -> int:
    from moe_train.data.sources import find_sources, sample_texts
    from moe_train.data.tokenizers import train_sentencepiece

    if not args.output.endswith(".model"):
        raise ValueError(f"the name of a sentencepiece model ends in .model, unlike {args.output}")
    texts = sample_texts(find_sources(args.source, args.text_format), args.text_column, args.sample_bytes)
    tokenizer = train_sentencepiece(texts, args.output, args.vocab_size)
    print(f"{args.output}: {tokenizer.vocab_size} tokens, sha256 {tokenizer.checksum}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from moe_train.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(args.model, args.eod_token)
    sizes = tokenizer.token_bytes()
    special = sorted((token, spelling) for spelling, token in tokenizer.special_tokens.items())
    longest = sorted(range(tokenizer.vocab_size), key=lambda token: (-sizes[token], token))[:8]
    print(f"tokens             {tokenizer.vocab_size}")
    print(f"sha256             {tokenizer.checksum}")
    print(f"end of document    {tokenizer.eod_id} {tokenizer.piece(tokenizer.eod_id)}")
    print(f"special tokens     {', '.join(f'{token} {spelling}' for token, spelling in special)}")
    print(f"bytes per token    {sizes[sizes > 0].mean():.2f} on average over the vocabulary, {sizes.max()} at most")
    print(f"longest tokens     {', '.join(repr(tokenizer.piece(token)) for token in longest)}")
    if args.text:
        ids = tokenizer.encode_batch([args.text])[0]
        print(f"text               {len(ids)} tokens, {len(args.text.encode()) / len(ids):.2f} bytes per token")
        print(" ".join(f"{token}:{tokenizer.piece(token)!r}" for token in ids.tolist()))
    return 0
