"""What inspect shows of a data set: its size, a document, a sample; text with its origin."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def data_name(path: str) -> str:
    """The name of a data set, also where one of its files was named."""
    from moe_train.data.indexed import idx_path

    for ending in (".idx", ".bin"):
        if path.endswith(ending) and not idx_path(path).is_file():
            return path.removesuffix(ending)
    return path


def show_overview(name: str, dataset: Any) -> None:
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


def show_sample(args: argparse.Namespace) -> int:
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
    show_text(reader.dataset, spans)
    return 0


def show_text(dataset: Any, spans: list[tuple[int, int]]) -> None:
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
            print(f"  {origin_of(origins, piece.document)}")
        begin = dataset.document_span(piece.document)[0]
        ids = dataset.read(begin + piece.first, begin + piece.stop).tolist()
        print("-" * 40)
        print(tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids)))
        print("-" * 40)


def origin_of(origins: Any, document: int) -> str:
    found = origins[document]
    return f"{found.id or '(no id)'} from {found.source} row {found.row}, domain {found.domain or '(none)'}"
