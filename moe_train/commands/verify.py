"""moe-train inspect --verify: whether checkpoints are what was written."""

from __future__ import annotations

from pathlib import Path

DAMAGED = 1


def verify(folder: Path) -> int:
    """Of a checkpoint, or of all that a run has; prints a line for each. Exit code: 0, or 1 where one is damaged.

    Errors: ValueError where there is none.
    """
    from moe_train.checkpoint.index import read_index
    from moe_train.checkpoint.store import BEST, LATEST, STEP, WEIGHTS, named_by
    from moe_train.checkpoint.verify import damages

    inside = [*folder.glob(f"checkpoints/{STEP}????????"), *folder.glob(f"checkpoints/{WEIGHTS}????????")]
    checkpoints = [folder] if (folder / "state.json").is_file() else sorted(inside)
    if not checkpoints:
        raise ValueError(f"{folder} holds no checkpoint")
    code = 0
    for checkpoint in checkpoints:
        found = list(damages(checkpoint))
        try:
            files = read_index(checkpoint).files
        except (ValueError, OSError) as error:
            found = found or [str(error)]
        if checkpoint != folder and not checkpoint.is_dir():
            print(f"{checkpoint}: removed meanwhile, as its run keeps fewer")
        elif found:
            code = DAMAGED
            print(f"{checkpoint}: DAMAGED", *(f"  {line}" for line in found), sep="\n")
        else:
            size = sum(file.bytes for file in files.values())
            print(f"{checkpoint}: {len(files)} files, {size:,} bytes, all as they were written")
    for pointer in (LATEST, BEST):
        try:
            named_by(folder / "checkpoints", pointer)
        except ValueError as error:
            code = DAMAGED
            print(f"DAMAGED: {error}")
    return code
