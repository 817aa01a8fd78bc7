"""Imports megatron-core and applies the few differences between a machine with an accelerator and one without.

Every other module gets megatron-core through ``import_megatron()`` having run once, so that the differences live here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from moe_train.parallel.device import use_cuda


@functools.cache
def import_megatron() -> None:
    """Imports megatron-core once; on a machine without an accelerator also redirects what it calls on CUDA."""
    with without_compiler(), warnings.catch_warnings():
        # A page of warnings per rank about Apex and Transformer Engine, which we do not use.
        warnings.simplefilter("ignore")
        import megatron.core.models.gpt  # noqa: F401
        import megatron.core.parallel_state  # noqa: F401
        from megatron.core.transformer import multi_latent_attention
    # It warns about every MoE layer that is not its own class.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    # 0.16.1 sets this to True even where Transformer Engine is absent; we use none of it.
    multi_latent_attention.HAVE_TE = False
    _without_generators()
    if not use_cuda():
        _redirect_to_cpu()


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Inside, torch.compile does nothing. megatron-core and DeepSpeed decorate functions with it while they are
    imported, which loads the whole compiler (seconds per rank) for kernels that this project does not call."""
    original = torch.compile
    torch.compile = _identity_decorator  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


_OWN = (
    *("DATA_PARALLEL_GROUP", "EXPERT_DATA_PARALLEL_GROUP"),
    *("EXPERT_MODEL_PARALLEL_GROUP", "TENSOR_MODEL_PARALLEL_GROUP"),
)
"""Groups that the engine is told of. ZeRO 3 sorts parameters by the group object, not by its ranks."""


@contextlib.contextmanager
def few_groups() -> Iterator[None]:
    """Inside, megatron-core makes one process group for each set of ranks, besides those that the engine is told of.
    For a layout it makes some twenty, most of the same few sets; each of gloo's has three threads, one of which looks
    for work a hundred times a second."""
    from megatron.core import parallel_state

    original = parallel_state.create_group
    made: dict[Any, Any] = {}

    def create_group(ranks: Iterable[int], *arguments: Any, group_desc: str = "", **options: Any) -> Any:
        key = tuple(ranks), group_desc if group_desc in _OWN else ""
        if key not in made:
            made[key] = original(list(key[0]), *arguments, group_desc=group_desc, **options)
        return made[key]

    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = original


def _identity_decorator(function: Any = None, **_: Any) -> Any:
    return function if function is not None else _identity_decorator


def _without_generators() -> None:
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    # A tracker whose fork() does nothing. Under sequence parallelism a block forks one for dropout, which we never
    # have, and the usual one wants generators of its own; on the CPU there is none to fork.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def _redirect_to_cpu() -> None:
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    # Called by rotary embedding, mappings and the vocabulary-parallel embedding to find "the" device.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    # A CUDA stream is built only while this is None.
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "host"
