"""Weights in 8-bit floating point with a scale per block of 128 x 128, as DeepSeek-V3 is published.

Suffixes: R rows, C columns, r and c blocks of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_train.interop.safetensors_file import StoredTensor
from moe_train.interop.typed import mapping

SCALE = "_scale_inv"
"""Behind the name of the weight that it belongs to."""
BLOCK = 128


def check_quantization(config: dict[str, Any]) -> bool:
    """Whether the weights come in 8-bit blocks. ValueError for any other quantisation."""
    stored = mapping("quantization_config", config.get("quantization_config"))
    if not stored:
        return False
    known = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}
    for key, value in known.items():
        if stored.get(key, value if key == "fmt" else None) != value:
            raise ValueError(
                f"config.json: quantization_config.{key} is {stored.get(key)!r}; only {value!r} can be read: take a "
                "version of the model that is not quantised"
            )
    return True


def dequantized_rows(weight: StoredTensor, scale: StoredTensor, first: int, stop: int) -> Tensor:
    """Rows [first, stop) of a weight [R, C] times the scale [r, c] of each one's block, in bfloat16."""
    scale_rc = scale.rows(first // BLOCK, -(-stop // BLOCK)).float()
    begin = first - first // BLOCK * BLOCK
    scale_RC = scale_rc.repeat_interleave(BLOCK, 0)[begin : begin + stop - first]
    scale_RC = scale_RC.repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
    return (weight.rows(first, stop).float() * scale_RC).to(torch.bfloat16)


def scale_shape(weight: StoredTensor) -> tuple[int, ...]:
    return tuple(-(-size // BLOCK) for size in weight.shape)
