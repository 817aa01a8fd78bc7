"""The alphabet in which byte-level BPE vocabularies are written: a printable character for each byte.

Printable characters of Latin-1 stand for themselves; the other bytes, in order, for the characters from U+0100 on.
Source: the vocabulary format of GPT-2 (Radford et al. 2019), which Hugging Face's ByteLevel keeps.
"""

from __future__ import annotations

from functools import cache


@cache
def byte_of_character() -> dict[str, int]:
    """Character -> byte, all 256."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def bytes_of_piece(piece: str) -> bytes:
    """The bytes that a piece of such a vocabulary stands for. KeyError where it is not written in this alphabet."""
    table = byte_of_character()
    return bytes(table[character] for character in piece)
