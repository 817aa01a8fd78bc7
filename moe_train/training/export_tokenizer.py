"""The tokenizer of a run beside its export, so that transformers' AutoTokenizer gives the ids of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_train.data.dataset import sidecar_stem
from moe_train.data.files import write_atomically
from moe_train.data.manifest import recorded_tokenizer
from moe_train.data.options import all_names
from moe_train.data.tokenizers.tiktoken_file import is_rank_file
from moe_train.interop.small_files import copy_tokenizer
from moe_train.training.run_config import RunConfig

_SETTINGS = "tokenizer_config.json"
_PROBE = (" a  \ufb01\t", "\u2581a\u2581\u2581\ufb01\t")
"""A text and what sentencepiece makes of it before it looks for pieces, where that is nothing but marking spaces."""


def carry_tokenizer(run: Path, config: RunConfig, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Copies the run folder's own tokenizer, else that of its data. Returns what config.json says of it, and notes.

    Errors: OSError; ValueError where the data's is damaged.
    """
    if copy_tokenizer(run, out):
        return {}, []
    for name in all_names(config.data):
        stem = Path(sidecar_stem(name))
        try:
            recorded = recorded_tokenizer(stem)
        except (FileNotFoundError, ValueError):
            continue
        path = stem.parent / recorded["file"]
        if not path.is_file():
            continue
        target = out / ("tokenizer.json" if path.suffix == ".json" else "tokenizer.model")
        write_atomically(target, path.read_bytes())
        settings, notes = _settings(target, path.name, recorded["eod_token"])
        if settings:
            text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
            write_atomically(out / _SETTINGS, text.encode())
        return {"eos_token_id": recorded["eod_id"]}, notes
    return {}, ["no tokenizer was found, neither in the run's folder nor beside its data: copy it to the export"]


def _settings(path: Path, name: str, end: str) -> tuple[dict[str, Any], list[str]]:
    """The content of tokenizer_config.json, without which transformers takes the tokenizer of the model's family.

    ``name``: of the file in the data's folder, for notes. ``end``: the token that ends documents.
    """
    if path.suffix == ".json":
        return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}, []
    if is_rank_file(path):
        return {}, [f"the tokenizer {name} is copied as it is, but transformers does not load it by itself"]
    import sentencepiece

    try:
        model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"the tokenizer {name} of the run's data is damaged") from error
    settings = {"eos_token": end, "unk_token": str(model.id_to_piece(model.unk_id()))}
    text, marked = _PROBE
    if model.normalize(text) == marked:
        unigram = any(score != round(score) for score in map(model.get_score, range(model.vocab_size())))
        notes = [] if not unigram else [
            f"the tokenizer {name} is a unigram model: where two ways to cut a word are as good as each other, "
            "transformers may take the other one than training did"
        ]  # fmt: skip
        return {"tokenizer_class": "PreTrainedTokenizerFast", **settings}, notes
    # The one above knows pieces only, neither a space in front nor other normalisation.
    return {"tokenizer_class": "SentencePieceBackend", **settings}, [
        f"the tokenizer {name} normalises texts: transformers encodes by its SentencePieceBackend as in training, but "
        "decodes without spaces at the ends and spells bytes; decode by the package sentencepiece"
    ]
