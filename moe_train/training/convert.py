"""Models of the hub as runs of ours, and back: what interop/ does, between a model folder and a run's folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_train import __version__
from moe_train.checkpoint.reading import StoredTensors
from moe_train.checkpoint.state import read_state_with_config
from moe_train.checkpoint.store import checkpoint_at
from moe_train.data.files import write_atomically
from moe_train.data.options import DataOptions
from moe_train.evaluation.result import read_evaluation
from moe_train.interop.config_export import carried
from moe_train.interop.exporting import check_stored, write_tensors
from moe_train.interop.forms import Form, hub_form
from moe_train.interop.hub_folder import CONFIG, read_json
from moe_train.interop.importing import RECORD, open_source, write_checkpoint, write_record
from moe_train.interop.model_card import model_card
from moe_train.interop.small_files import copy_others, copy_tokenizer
from moe_train.interop.whole_folder import check_target, whole_folder
from moe_train.training import run_folder
from moe_train.training.export_tokenizer import carry_tokenizer
from moe_train.training.options import TrainOptions
from moe_train.training.origin import GENERATION, TOKENS
from moe_train.training.run_config import RunConfig, from_dict, to_dict, to_yaml
from moe_train.training.run_tokenizer import ORIGIN

HUB = "hf"
"""In the folder of an imported model: what it came with."""
RUN_FOLDERS = (HUB, run_folder.CHECKPOINTS)
"""The folders of an imported or upcycled model that nobody has used yet."""
UPCYCLED = "upcycled"
"""File in the folder of an upcycled model that says what it was made of."""
_EXPORTED = ".moe_train_export"
"""File in an exported model, by which --force knows it from what was downloaded."""
_LONGEST = 4096
"""Tokens per sequence that an imported model's configuration says at most; data.sequence_length changes it."""


@dataclass(frozen=True)
class Report:
    """What was done, for the user."""

    summary: str
    notes: list[str]


def import_model(folder: Path, out: Path, *, force: bool = False, drop_multi_token: bool = False) -> Report:
    """A model folder of the hub -> a run's folder with a checkpoint of weights at step 0.

    Errors: ValueError that says what is wrong with the folder, or what our models cannot do; OSError.
    """
    check_target(out, force=force, ours=_is_imported, what="an imported model", folders=RUN_FOLDERS)
    source = open_source(folder, drop_multi_token=drop_multi_token)
    config = from_dict(
        to_dict(
            RunConfig(
                name=out.resolve().name,
                model=source.hub.model,
                router=source.hub.router,
                data=DataOptions(sequence_length=min(source.hub.max_length, _LONGEST)),
                train=TrainOptions(precision="bfloat16" if source.dtype == torch.bfloat16 else "float32"),
            )
        ),
        source=f"{folder / CONFIG}, as our options",
    )
    with whole_folder(out) as temporary:
        write_atomically(temporary / run_folder.CONFIG, to_yaml(config).encode())
        (temporary / HUB).mkdir()
        copy_others(folder, temporary / HUB)
        write_record(source, temporary / HUB)
        tokenizer = copy_tokenizer(folder, temporary)
        write_checkpoint(source, temporary / run_folder.CHECKPOINTS, to_dict(config))
    notes = source.notes() + ([] if tokenizer else [f"{folder} has no tokenizer"])
    summary = f"{out}: {config.model.family}, {len(source.stored)} tensors, {source.dtype}".replace("torch.", "")
    return Report(summary, notes)


def export_model(
    path: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: str = "auto",
    form: Form = "auto",
    shard_bytes: int,
    force: bool = False,
) -> Report:
    """A run's folder or a checkpoint in it -> a model folder that transformers loads.

    ``dtype``: auto (each tensor's own for an imported or upcycled model, else what the run
    computed in), float32 or bfloat16.
    ``form``: a class of transformers, a modelling file of its own, or (auto) that only where there is no such class.
    Errors: ValueError where the form cannot hold the model, or the checkpoint is damaged; OSError.
    """
    check_target(out, force=force, ours=_is_exported, what=f"an exported model (with {_EXPORTED})")
    directory = checkpoint_at(path, step)
    state = read_state_with_config(directory)
    config = from_dict(state["config"], source=f"{directory}/state.json")
    run = directory.resolve().parents[1]
    imported = bool(state.get("weights_only")) and (run / HUB / RECORD).is_file()
    record = read_json(run / HUB / RECORD) if imported else {}
    asked = None if dtype == "auto" else {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    computed = _weights_dtype(directory) if state.get("weights_only") else _precision(config)
    target = asked or (None if state.get("weights_only") else computed)
    came = read_json(run / HUB / CONFIG) if (run / HUB / CONFIG).is_file() else {}
    length = max(config.data.sequence_length, came.get("max_position_embeddings") or 0)
    hub = hub_form(config.model, config.router, form, max_length=length, dtype=asked or computed)
    content, original = hub.content, None
    kind = content["architectures"][0]
    if imported and hub.custom is None:
        original = carried(came, config.model, config.router, dtype=asked)
    with StoredTensors(directory) as stored, whole_folder(out) as temporary:
        check_stored(stored, hub.layout, hub.left_out)
        write_atomically(temporary / _EXPORTED, f"moe_train {__version__}\n".encode())
        if came:
            copy_others(run / HUB, temporary, without=(RECORD, CONFIG, ORIGIN))
        tokens, notes = carry_tokenizer(run, config, temporary)
        as_it_came = original is not None
        if original is None:
            known = came | tokens
            original = content | {key: known[key] for key in TOKENS if key in known}
        _write_json(temporary / CONFIG, original)
        hub.write_code(temporary)
        if not (temporary / GENERATION).is_file():
            ids = {key: original[key] for key in TOKENS if original.get(key) is not None}
            _write_json(temporary / GENERATION, {"_from_model_config": True, **ids})
        written = write_tensors(
            stored,
            hub.layout,
            temporary,
            dtype=partial(_dtype, target),
            copies=record.get("copies", []),
            shard_bytes=shard_bytes,
        )
        if not (as_it_came and (temporary / "README.md").is_file()):
            card = model_card(
                config.name,
                config.model,
                config.router,
                hub_class=kind,
                custom=hub.custom,
                step=state["step"],
                evaluation=_evaluation(run, state["step"]),
            )
            write_atomically(temporary / "README.md", card.encode())
    if hub.custom is not None:
        notes.append(f"it has a modelling file of its own (trust_remote_code=True): {'; '.join(hub.custom)}")
    if hub.left_out is not None:
        notes.append("the layer of multi-token prediction is left out, as transformers leaves it out")
    if record.get("dequantised"):
        notes.append("the weights came in 8-bit blocks and are written in bfloat16")
    summary = f"{out}: {kind}, {written.tensors} tensors, {written.values:,} values, {len(written.files)} files"
    return Report(summary, notes)


def _evaluation(run: Path, step: int) -> dict[str, Any] | None:
    """The newest result of this step."""
    paths = sorted((run / "evaluation").glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    results = (read_evaluation(path) for path in paths)
    return next((result for result in results if result["step"] == step and "mean" in result), None)


def _precision(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32


def _weights_dtype(directory: Path) -> torch.dtype:
    """Of most of the values."""
    with StoredTensors(directory) as stored:
        return stored.dtypes["model.embedding.word_embeddings.weight"]


def _dtype(target: torch.dtype | None, name: str, stored: torch.dtype) -> torch.dtype:
    return target or stored


def _is_imported(folder: Path) -> bool:
    return (folder / HUB / RECORD).is_file() and not any((folder / n).exists() for n in (run_folder.METRICS, UPCYCLED))


def _is_exported(folder: Path) -> bool:
    return (folder / _EXPORTED).is_file()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
