"""The tokenizer of a run: where to find it, and what generation needs of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.data.dataset import sidecar_stem
from moe_train.data.files import sha256_of
from moe_train.data.manifest import manifest_path, recorded_tokenizer, tokenizer_of
from moe_train.data.options import names_of
from moe_train.data.tokenizers import Tokenizer, check_unicode, load_tokenizer
from moe_train.data.tokenizers.hugging_face import FILE, HuggingFaceTokenizer
from moe_train.training.run_folder import METRICS

if TYPE_CHECKING:
    from moe_train.training.run_config import RunConfig


class NoTokenizer(ValueError):
    """Nobody says which tokenizer a run has."""


IMPORTED = "hf"
"""Folder with the files that an imported model came with; also in runs that began with its weights."""
ORIGIN = "origin.json"
"""In that folder, where it was copied to a run: where from, and which files of a tokenizer came along."""
IN_FOLDER = (FILE, "tokenizer.model")


def run_tokenizer(run_dir: Path, config: RunConfig, path: Path | None = None) -> Tokenizer:
    """The tokenizer at ``path``; without one that in the run folder (an imported model has it there), or the copy
    beside the run's data.

    Errors: NoTokenizer (a ValueError) where none is found; ValueError where it has more ids than the model; those of
    `load_tokenizer`.
    """
    tokenizer = load_tokenizer(path) if path is not None else _found(run_dir, config)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids, the model only {config.model.vocab_size}: "
            "it is not the one that the model was trained with"
        )
    return tokenizer


def _found(run_dir: Path, config: RunConfig) -> Tokenizer:
    blends = [config.data.train, config.data.validation, *(stage.train for stage in config.data.stages)]
    stems = [sidecar_stem(name) for blend in blends for name in names_of(blend)]
    if any((run_dir / name).is_file() for name in IN_FOLDER):
        return load_tokenizer(run_dir, _recorded_end(run_dir, stems))
    for stem in stems:
        if manifest_path(stem).is_file():
            return tokenizer_of(stem)
    places = ", ".join(str(place) for place in [run_dir, *(manifest_path(stem) for stem in stems)])
    raise NoTokenizer(
        f"no tokenizer is known for {run_dir} (looked for {' or '.join(IN_FOLDER)} in the run folder and for the "
        f"manifest of its data: {places}); give one with --tokenizer PATH"
    )


def _recorded_end(run_dir: Path, stems: list[str]) -> str | None:
    """The token that ended documents in training, where the data was written with the tokenizer in the run folder."""
    checksum = sha256_of(next(run_dir / name for name in IN_FOLDER if (run_dir / name).is_file()))
    for recorded in (recorded_tokenizer(stem) for stem in stems if manifest_path(stem).is_file()):
        if recorded["checksum"] == checksum:
            return str(recorded["eod_token"])
    return None


def encode_prompts(tokenizer: Tokenizer, run_dir: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each prompt.

    In front of those for an imported model stands what its tokenizer puts there (Llama and Mixtral: one that begins
    texts); our own training has nothing there, also where it went on from an imported model. An empty prompt is the id
    that ends documents, behind which a new one begins. Errors: ValueError for text that is not valid Unicode.
    """
    for number, text in enumerate(texts):
        check_unicode(text, f"prompt {number}")
    start: list[int] = []
    # An upcycled model has no records, but may be made of a run.
    trained = any((run_dir / name).exists() for name in (METRICS, f"{IMPORTED}/{ORIGIN}"))
    if (run_dir / IMPORTED).is_dir() and not trained and isinstance(tokenizer, HuggingFaceTokenizer):
        start = tokenizer.start_ids()
    return [[*start, *ids.tolist()] or [tokenizer.eod_id] for ids in tokenizer.encode_batch(texts)]


def end_ids(tokenizer: Tokenizer, run_dir: Path) -> frozenset[int]:
    """Ids that end a text: that which ends documents, and those in an imported model's generation_config.json."""
    ends = {tokenizer.eod_id}
    path = run_dir / IMPORTED / "generation_config.json"
    if path.is_file():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        ends |= set(named if isinstance(named, list) else [] if named is None else [named])
    return frozenset(int(token) for token in ends)
