"""Counter-based random numbers: noise that is a function of what it is for, not of the order of the calls.

A token's noise depends on (name, keys, sample, position) only, so it is the same in every batch composition, on every
layout, in recomputation and on resume, and nothing has to be saved.

Generator: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The counter is
(sample low, sample high, position, block) and the key a hash of the name and the keys. Integers are equal on all
devices; the float64 logarithm and cosine behind the normal may differ in the last bit before rounding to float32.

Suffixes: T tokens, N numbers per token, J blocks of four numbers.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words of 32 random bits per counter. All words are int64 tensors that hold values in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, which keeps all bits; the mask undoes the sign of the shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, ((p0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _key(name: str, keys: tuple[int, ...]) -> tuple[int, int]:
    digest = hashlib.blake2b(repr((name, tuple(int(k) for k in keys))).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _words(name: str, keys: tuple[int, ...], sample_T: Tensor, position_T: Tensor, numbers: int) -> tuple[Tensor, ...]:
    """Four tensors [T, J] of 32 random bits, J = ceil(numbers / 4)."""
    blocks = (numbers + 3) // 4
    block_J = torch.arange(blocks, device=sample_T.device, dtype=torch.int64)
    shape = (sample_T.shape[0], blocks)
    sample_T, position_T = sample_T.to(torch.int64), position_T.to(torch.int64)
    low, high, position = (x[:, None].expand(shape) for x in (sample_T & _LOW, (sample_T >> 32) & _LOW, position_T))
    return philox4x32((low, high, position & _LOW, block_J.expand(shape)), _key(name, keys))


def _shaped(columns: list[Tensor], tokens: int, numbers: int, shape: tuple[int, ...]) -> Tensor:
    values_TN = torch.stack(columns, dim=-1).flatten(1)[:, :numbers]
    return values_TN.to(torch.float32).reshape(tokens, *shape)


def counter_normal(
    name: str, keys: tuple[int, ...], sample_T: Tensor, position_T: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """Standard normal numbers, float32 [T, *shape], by Box-Muller; |value| is at most 6.8."""
    numbers = math.prod(shape)
    unit = [(w.double() + 0.5) * 2.0**-32 for w in _words(name, keys, sample_T, position_T, numbers)]
    columns = []
    for radius, angle in (unit[:2], unit[2:]):
        r, a = torch.sqrt(-2.0 * torch.log(radius)), 2.0 * math.pi * angle
        columns += [r * torch.cos(a), r * torch.sin(a)]
    return _shaped(columns, sample_T.shape[0], numbers, shape)
