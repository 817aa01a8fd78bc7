"""What a run keeps of the model whose weights it begins with: what that came with from the hub, and its tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from moe_train.data.dataset import sidecar_stem
from moe_train.data.files import sha256_of, write_atomically
from moe_train.data.manifest import recorded_tokenizer
from moe_train.data.options import DataOptions, all_names
from moe_train.interop.hub_folder import CONFIG, read_json
from moe_train.interop.importing import RECORD
from moe_train.interop.small_files import TOKENIZER_FILES, copy_others
from moe_train.training.run_tokenizer import IMPORTED, IN_FOLDER, ORIGIN

GENERATION = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json that a model's own file knows better than its options."""


def carry_origin(run_dir: Path, checkpoint: Path, data: DataOptions) -> str | None:
    """Copies hf/ and the tokenizer of the run that ``checkpoint`` lies in, where that has hf/; keeps what is there.

    Where the data has another tokenizer, that is the run's, and what speaks of tokens is not copied; the note that is
    returned says so. Errors: OSError; ValueError where a file is damaged.
    """
    source, target = checkpoint.resolve().parents[1], run_dir / IMPORTED
    if (target / ORIGIN).is_file() and read_json(target / ORIGIN).get("from") != str(source):
        forget_origin(run_dir)  # of an attempt that took no step and began with another model
    if not (source / IMPORTED).is_dir() or target.exists():
        return None
    recorded = _checksums(data)
    own = {sha256_of(source / name) for name in IN_FOLDER if (source / name).is_file()}
    other = bool(recorded and own) and not recorded <= own
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if (recorded and not recorded <= own) or any((run_dir / name).exists() for name in TOKENIZER_FILES):
        names = []
    temporary = run_dir / f".{IMPORTED}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    copy_others(source / IMPORTED, temporary, without=(RECORD, ORIGIN, *((GENERATION,) if other else ())))
    if other and (temporary / CONFIG).is_file():
        content = {key: value for key, value in read_json(temporary / CONFIG).items() if key not in TOKENS}
        write_atomically(temporary / CONFIG, json.dumps(content, indent=2).encode())
    write_atomically(temporary / ORIGIN, json.dumps({"from": str(source), "tokenizer": names}, indent=1).encode())
    for name in names:
        write_atomically(run_dir / name, (source / name).read_bytes())
    temporary.replace(target)
    if not other:
        return None
    return (
        f"note: the data has another tokenizer than {source}: exports of this run get that of the data, and neither "
        "token ids, generation settings nor a chat template of the model that it begins with"
    )


def forget_origin(run_dir: Path) -> None:
    """Takes away what `carry_origin` has copied; for a folder whose run has taken no step."""
    path = run_dir / IMPORTED / ORIGIN
    if not path.is_file():
        return
    for name in set(read_json(path).get("tokenizer", [])) & set(TOKENIZER_FILES):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(path.parent)


def _checksums(data: DataOptions) -> set[str]:
    """Of the tokenizers that the manifests of the data name."""
    found = set()
    for name in all_names(data):
        try:
            found.add(str(recorded_tokenizer(sidecar_stem(name))["checksum"]))
        except (FileNotFoundError, ValueError):
            continue
    return found
