"""Whether the evaluation that ends every run can be made, found out before the first run starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_train.data.dataset import Dataset, open_dataset, open_loss_mask, sidecar_stem
from moe_train.data.document_batches import DocumentSet
from moe_train.data.domains import Domains, documents_path
from moe_train.data.manifest import manifest_path, recorded_tokenizer
from moe_train.data.options import all_names, names_of
from moe_train.lab.plan import PlannedRun
from moe_train.training.validation import check_vocabulary, token_bytes

_CHUNK = 1 << 22


def check_evaluation_data(runs: Sequence[PlannedRun]) -> None:
    """ValueError where the data that the runs are evaluated on is not there, damaged, too small, or of another
    tokenizer than the model or the training data.

    Each combination that occurs is looked at once. What is read is the index; the tokens only where no table of a
    tokenizer says which there can be.
    """
    seen: set[tuple[Any, ...]] = set()
    for run in runs:
        names, trained = _names(run), all_names(run.config.data)
        combination = (*names, None, *trained, run.config.model.vocab_size)
        if combination not in seen:
            seen.add(combination)
            _check(run, names, trained)


def _names(run: PlannedRun) -> list[str]:
    return [run.protocol.data] if run.protocol.data else names_of(run.config.data.validation)


def _check(run: PlannedRun, names: Sequence[str], trained: Sequence[str]) -> None:
    key = "evaluation.data" if run.protocol.data else "data.validation"
    if run.protocol.documents and len(names) != 1:
        raise ValueError(
            f"{key} has {len(names)} data sets ({', '.join(names)}), and documents are evaluated in one at a time: "
            "name it under evaluation.data"
        )
    for name in names:
        try:
            _open(run, name)
        except FileNotFoundError as error:
            raise ValueError(f"{key} = {name}: {error}. {_how_to_make(name, trained)}") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{key} = {name}: {error}") from None
    try:
        check_vocabulary([*trained, *names], run.config.model.vocab_size)
    except ValueError as error:
        raise ValueError(f"{key} = {', '.join(names)}, to evaluate {run.arm}: {error}") from None


def _open(run: PlannedRun, name: str) -> None:
    """Everything that the evaluation opens (training.validation, training.document_validation)."""
    dataset = open_dataset(name)
    mask = open_loss_mask(dataset)
    if documents_path(sidecar_stem(name)).is_file():
        Domains(dataset)
    if run.protocol.documents:
        stem = sidecar_stem(name)
        end = recorded_tokenizer(stem)["eod_id"] if manifest_path(stem).is_file() else None
        DocumentSet(dataset, run.protocol.max_length, eod_id=end, loss_mask=mask)
    elif dataset.token_count < 2:
        raise ValueError(f"evaluation needs at least 2 tokens: {dataset.prefix} is too small")
    if token_bytes(name) is None:
        _check_ids(dataset, run.config.model.vocab_size)


def _check_ids(dataset: Dataset, vocab_size: int) -> None:
    for start in range(0, dataset.token_count, _CHUNK):
        highest = int(dataset.read(start, min(start + _CHUNK, dataset.token_count)).max())
        if highest >= vocab_size:
            raise ValueError(
                f"it holds token {highest}, more than model.vocab_size = {vocab_size} knows; use the vocabulary of the "
                "tokenizer that wrote the data"
            )


def _how_to_make(name: str, trained: Sequence[str]) -> str:
    """The command, with the name of the training data's tokenizer where that is known."""
    stems = [sidecar_stem(other) for other in trained]
    files = [recorded_tokenizer(stem)["file"] for stem in stems if manifest_path(stem).is_file()]
    tokenizer = f"the tokenizer of the training data ({files[0]})" if files else "the tokenizer of the training data"
    return (
        f"Make it by `moe-train prepare TEXT --output {sidecar_stem(name)} --tokenizer TOKENIZER` with {tokenizer}; "
        "docs/compare.md has the whole commands of the shipped comparisons"
    )
