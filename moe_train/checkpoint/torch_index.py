"""The index that torch.distributed.checkpoint reads (.metadata), so that torch's own tools can open a checkpoint.

It is a pickle: this project writes it and never reads it.
"""

from __future__ import annotations

import pickle

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from moe_train.checkpoint.index import Index

METADATA = ".metadata"


def torch_index_bytes(index: Index) -> bytes:
    """The content of .metadata."""
    tensors = {
        key: TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape), [])
        for key, tensor in index.tensors.items()
    }
    places = {}
    for box in index.boxes:
        offsets, sizes = torch.Size(box.offsets), torch.Size(box.sizes)
        tensors[box.key].chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
        places[MetadataIndex(box.key, offsets)] = _StorageInfo(box.file, box.start, box.length)
    return pickle.dumps(Metadata(state_dict_metadata=dict(tensors), storage_data=places))
