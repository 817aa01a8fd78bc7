"""Arrays of token ids: `.npy` files."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_train.data.sources.rows import SourceFile


def read_token_array(file: SourceFile) -> npt.NDArray[Any]:
    """[documents, tokens] integers; an array of one dimension is one document. Mapped, not read, where it is local.

    Errors: ValueError for a damaged file, or one that holds something else.
    """
    try:
        if file.is_local:
            found = np.load(file.path, mmap_mode="r", allow_pickle=False)
        else:
            with file.open() as stream:
                found = np.load(stream, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{file.path} is not an array of numpy, or it is damaged: {error}") from error
    if found.dtype.kind not in "iu" or found.ndim not in (1, 2):
        raise ValueError(
            f"{file.path} holds {found.dtype} of shape {found.shape}; token ids are integers, [tokens] for one "
            "document or [documents, tokens]"
        )
    return found.reshape(-1, found.shape[-1]) if found.ndim == 2 else found[None]
