"""Where the time of our step goes: stopwatches at the borders of modules, forward and backward.

A backward pass has borders too: it enters a module when the gradient of its output is ready and leaves when that of
its input is. What autograd runs in between belongs to the module, with weight gradients and the engine's hooks on them.
On CUDA every border synchronises, so shares are right but the step is slower than without.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

PARTS = ("attention", "experts", "permute + gate + dispatch", "head + loss", "optimizer", "rest")
"""rest: embedding, norms, residual additions, batch, statistics, what the engine does between."""


def breakdown(arm: Any, batches: list[Any], device: torch.device) -> dict[str, dict[str, float]]:
    """Median seconds per part, and its share of the median step, of an arm of moe_train ("engine" or "model")."""
    watch = _Stopwatch(device)
    _attach(arm, watch)
    samples: dict[str, list[float]] = defaultdict(list)
    for batch in batches:
        watch.seconds.clear()
        watch.start("step")
        arm.step(batch)
        watch.stop("step")
        seconds = dict(watch.seconds)
        seconds["permute + gate + dispatch"] = seconds.pop("moe") - seconds["experts"]
        seconds["rest"] = seconds["step"] - sum(seconds.get(part, 0.0) for part in PARTS if part != "rest")
        for part, value in seconds.items():
            samples[part].append(value)
    step = median(samples["step"])
    return {part: {"seconds": median(samples[part]), "share": median(samples[part]) / step} for part in PARTS}


class _Stopwatch:
    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.started: dict[str, float] = {}
        self.synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def start(self, part: str) -> None:
        self.synchronize()
        self.started[part] = time.perf_counter()

    def stop(self, part: str) -> None:
        self.synchronize()
        self.seconds[part] += time.perf_counter() - self.started.pop(part)


def _attach(arm: Any, watch: _Stopwatch) -> None:
    from moe_train.model.experts.module import Experts
    from moe_train.model.head import LanguageModelHead
    from moe_train.model.moe_layer import MoELayer

    for name, module in arm.module.named_modules():
        if isinstance(module, MoELayer):
            _watch_module(module, "moe", watch)
        elif isinstance(module, Experts):
            _watch_module(module, "experts", watch)
        elif isinstance(module, LanguageModelHead):
            _watch_module(module, "head + loss", watch)
        elif name.endswith("self_attention"):
            _watch_module(module, "attention", watch)
    owner, method = arm.optimizer_owner()
    original = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        watch.start("optimizer")
        result = original(*args, **kwargs)
        watch.stop("optimizer")
        return result

    setattr(owner, method, timed)


def _watch_module(module: torch.nn.Module, part: str, watch: _Stopwatch) -> None:
    module.register_forward_pre_hook(lambda *_: watch.start(part))
    module.register_forward_hook(lambda *_: watch.stop(part))
    module.register_full_backward_pre_hook(lambda *_: watch.start(part))
    module.register_full_backward_hook(lambda *_: watch.stop(part))
