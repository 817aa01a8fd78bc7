"""torch.distributed.checkpoint reading and writing owned slices: planners that know boxes of named global tensors.

Every rank writes the boxes that it owns and asks for the boxes that it wants; which rank wrote what does not matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moe_train.checkpoint.slices import Box, OwnedSlice, cut


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=box.data.shape)


class SliceSavePlanner(DefaultSavePlanner):
    """Writes this rank's slices."""

    def __init__(self, slices: list[OwnedSlice]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.boxes = {MetadataIndex(b.key, torch.Size(b.offsets)): b for s in slices for b in cut(s)}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict = {}
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index=index,
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=_chunk(box),
                        properties=TensorProperties.create_from_tensor(box.data),
                        size=torch.Size(box.shape),
                    ),
                )
                for index, box in self.boxes.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.boxes[MetadataIndex(index.fqn, index.offset)].data


class SliceLoadPlanner(DefaultLoadPlanner):
    """Reads into this rank's slices. A tensor that is missing or has another shape is a ValueError that names it."""

    def __init__(self, slices: list[OwnedSlice]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.wanted: dict[str, list[Box]] = {}
        for owned in slices:
            self.wanted.setdefault(owned.key, []).extend(cut(owned))
        self.targets = {(b.key, b.offsets): b.data for group in self.wanted.values() for b in group}

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict = {}
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for key, group in self.wanted.items():
            stored = self.metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(key, stored, [_chunk(box) for box in group])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.targets[index.fqn, tuple(index.offset)]


def check_geometry(metadata: Metadata, expected: dict[str, tuple[int, ...]], where: str) -> None:
    """Raises ValueError when ``expected`` (global name -> shape) and the stored tensors of the same kind differ."""
    kinds = {key.partition(".")[0] for key in expected}
    stored = {
        key: tuple(value.size)
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata) and key.partition(".")[0] in kinds
    }
    problems = [f"missing in the checkpoint: {key}" for key in sorted(expected.keys() - stored.keys())]
    problems += [f"not in this model: {key}" for key in sorted(stored.keys() - expected.keys())]
    problems += [
        f"{key}: shape {stored[key]} in the checkpoint, {expected[key]} in this model"
        for key in sorted(expected.keys() & stored.keys())
        if stored[key] != expected[key]
    ]
    if problems:
        shown = "\n  ".join(problems[:10] + ([f"… and {len(problems) - 10} more"] if len(problems) > 10 else []))
        raise ValueError(
            f"checkpoint {where} is of another model:\n  {shown}\nUse the configuration that it was trained with "
            "(config.yaml in its run folder)."
        )
