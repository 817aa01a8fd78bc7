"""Imported once by the fork server, so that every process that it forks starts with the slow imports done."""

from __future__ import annotations

import logging
import warnings

import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
logging.getLogger("megatron").setLevel(logging.ERROR)

from moe_train.parallel.megatron import import_megatron, without_compiler  # noqa: E402

import_megatron()
with without_compiler():
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
import torch.distributed.checkpoint  # noqa: E402, F401

import moe_train.model.language_model  # noqa: E402, F401
import moe_train.training.state  # noqa: E402, F401
import moe_train.training.step  # noqa: E402, F401
from moe_train.routing.options import RouterOptions  # noqa: E402
from moe_train.routing.registry import check_options  # noqa: E402

# Arithmetic on the meta device imports a good part of torch when it is used first.
check_options(RouterOptions(), num_experts=8)
