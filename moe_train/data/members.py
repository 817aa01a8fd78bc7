"""Opens the data sets that a configuration names, each with the reader that the configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_train.data.dataset import open_dataset, open_loss_mask, sidecar_stem
from moe_train.data.domains import Domains
from moe_train.data.index import OncePerNode, open_index
from moe_train.data.manifest import manifest_path, recorded_tokenizer
from moe_train.data.options import DataOptions
from moe_train.data.readers import DocumentReader, PackedDocumentReader, Reader, WindowReader


def open_reader(
    name: str, options: DataOptions, *, cache: Path, once: OncePerNode, with_domains: bool = False
) -> Reader:
    """The data set of a name, cut into samples as `options` say. Errors as those of `open_dataset`.

    cache, once: as for `index.open_index`.
    """
    dataset = open_dataset(name)
    mask, domains = open_loss_mask(dataset), Domains(dataset) if with_domains else None
    length = options.sequence_length
    if options.sampler == "packed":
        return WindowReader(dataset, length, reset=options.reset_at_documents, mask=mask, domains=domains)
    index = open_index(dataset, name, length, cache, pack=options.pack_documents, once=once)
    reader = PackedDocumentReader if options.pack_documents else DocumentReader
    return reader(dataset, length, index, mask=mask, domains=domains)


def check_one_tokenizer(names: Sequence[str]) -> None:
    """Raises ValueError where the manifests of data sets name different tokenizers: their ids mean different things.

    Data sets without a manifest are taken as they are.
    """
    known: dict[str, str] = {}
    for name in names:
        if manifest_path(sidecar_stem(name)).is_file():
            known.setdefault(str(recorded_tokenizer(sidecar_stem(name))["checksum"]), name)
    if len(known) > 1:
        first, second, *_ = known.values()
        raise ValueError(
            f"{first} and {second} were written by different tokenizers (their manifests name different checksums); "
            "prepare them again with one tokenizer"
        )
