"""Imported once by the fork server, so that every process that it forks starts with the slow imports done."""

from __future__ import annotations

import logging
import warnings

import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
logging.getLogger("megatron").setLevel(logging.ERROR)

from moe_train.parallel.megatron import import_megatron  # noqa: E402

import_megatron()

import deepspeed  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402, F401

import moe_train.model.language_model  # noqa: E402, F401
import moe_train.training.engine  # noqa: E402, F401
