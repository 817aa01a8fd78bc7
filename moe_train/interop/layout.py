"""A family's table laid out for one model: each tensor of the hub, and the boxes of ours that it is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moe_train.interop.shapes import Shapes, layers, state_names, weight_shapes
from moe_train.interop.tables import NEXT_TOKEN, TABLES, TIED, Copy, Part, Row
from moe_train.model.families import head_width, moe_layer_numbers
from moe_train.model.options import ModelOptions
from moe_train.routing.options import RouterOptions

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor of the hub that are a box of one of ours, with the values in the same order."""

    first: int
    stop: int
    key: str
    offsets: Shape
    sizes: Shape


@dataclass(frozen=True)
class HubTensor:
    name: str
    shape: Shape
    pieces: tuple[Piece, ...]
    """In order; empty where it is zero."""


@dataclass(frozen=True)
class Layout:
    shapes: Shapes
    """Name -> shape of ours."""
    tensors: list[HubTensor]
    copies: list[Copy]
    padding: list[tuple[str, int]]
    """Names of ours whose rows from there on are padding: zero, and unknown to the hub."""
    states: frozenset[str]
    """Names of ours that keep their type whatever the weights have."""


def lay_out(model: ModelOptions, router: RouterOptions, table: list[Row] | None = None) -> Layout:
    """By the family's table where none is given. ValueError that names what of ours has no place in it."""
    shapes = weight_shapes(model, router)
    rows = TABLES[model.family] if table is None else table
    tensors = [tensor for row in rows for tensor in _tensors(row, shapes, model)]
    padding: list[tuple[str, int]] = [
        (name, model.vocab_size)
        for name in ("embedding.word_embeddings.weight", "output_layer.weight")
        if name in shapes and shapes[name][0] > model.vocab_size
    ]
    covered = {name: (shapes[name][0] - first) * math.prod(shapes[name][1:]) for name, first in padding}
    for tensor in tensors:
        for piece in tensor.pieces:
            covered[piece.key] = covered.get(piece.key, 0) + math.prod(piece.sizes)
    left = [name for name, shape in shapes.items() if covered.get(name, 0) != math.prod(shape)]
    if left:
        raise ValueError(
            f"{model.family} has no place for {left[0]}" + (f" and {len(left) - 1} more" if left[1:] else "")
        )
    return Layout(shapes, tensors, _copies(model), padding, state_names(model, router))


def _copies(model: ModelOptions) -> list[Copy]:
    found = [TIED] if model.tie_embeddings else []
    if model.multi_token.layers:
        found += [Copy(c.hub.format(next=model.num_layers), c.of) for c in NEXT_TOKEN]
    # With tied embeddings there is no head to repeat.
    return [Copy(c.hub, TIED.of, c.optional) if model.tie_embeddings and c.of == TIED.hub else c for c in found]


def _tensors(row: Row, shapes: Shapes, model: ModelOptions) -> Iterator[HubTensor]:
    with_experts = moe_layer_numbers(model)
    for number, prefix in layers(model) if "{layer}" in row.ours else [(model.num_layers, "")]:
        ours = row.ours.format(layer=prefix)
        experts = range(model.moe.num_experts) if "{expert}" in row.hub else [None]
        if ours not in shapes:
            if row.zeros and number in with_experts:
                yield HubTensor(row.hub.format(layer=number), (model.moe.num_experts,), ())
            continue
        for expert in experts:
            yield _tensor(
                row.hub.format(layer=number, next=number, expert=expert), ours, row.part, shapes[ours], expert, model
            )


def _tensor(name: str, key: str, part: Part, whole: Shape, expert: int | None, model: ModelOptions) -> HubTensor:
    """``expert``: first index into our tensor, which the hub's lacks."""
    shape = whole if expert is None else whole[1:]
    rows = list(_rows(part, shape, model))
    pieces, position = [], 0
    for first, count in rows:
        offsets, sizes = (first, *(0,) * (len(shape) - 1)), (count, *shape[1:])
        if expert is not None:
            offsets, sizes = (expert, *offsets), (1, *sizes)
        pieces.append(Piece(position, position + count, key, offsets, sizes))
        position += count
    return HubTensor(name, (position, *shape[1:]), tuple(pieces))


def _rows(part: Part, shape: Shape, model: ModelOptions) -> Iterator[tuple[int, int]]:
    """(first, count) of the rows of ours that the hub's tensor is made of, in its order."""
    if part is Part.WHOLE:
        yield 0, shape[0]
    elif part is Part.VOCABULARY:
        yield 0, model.vocab_size
    elif part in (Part.GATE, Part.UP):
        half = shape[0] // 2
        yield (0 if part is Part.GATE else half), half
    else:
        width, groups = head_width(model), model.num_key_value_heads
        queries = model.num_attention_heads // groups * width
        start = {Part.QUERY: 0, Part.KEY: queries, Part.VALUE: queries + width}[part]
        for group in range(groups):
            yield group * (queries + 2 * width) + start, queries if part is Part.QUERY else width
