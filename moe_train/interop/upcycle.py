"""A dense model as the start of one with experts.

Every expert begins as a copy of the dense layer's feed-forward part (Komatsuzaki et al. 2022, arXiv 2212.05055), or as
a slice of it (fine-grained: He et al. 2024, arXiv 2410.07524). The output stays the dense model's where the gate's
combine weights always have the same sum c:

- Copies: a token's experts are all alike, so their weighted sum is c times the dense output; down projections are
  divided by c.
- Slices (``granularity`` G): G neighbouring experts hold all slices of one copy. They begin with equal rows in the
  gate, so that they are chosen together (ties go to the lower index, k is a multiple of G) with equal weights. One
  slice of all chosen copies has c / G of the weight; down projections are multiplied by G / c.
- A shared expert takes the first inner units itself, the experts have copies or slices of the others.

Suffixes: F inner width, H hidden, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_train.model.families import family_of, moe_layer_numbers
from moe_train.model.initialization import initial_gate, noise_of_expert
from moe_train.model.options import ModelOptions
from moe_train.routing.interface import Gate, TokenBatch
from moe_train.routing.options import RouterOptions
from moe_train.routing.registry import blank_gate, build_gate, check_options

FAMILY_WITH_EXPERTS = {"qwen3": "qwen3_moe", "llama3": "mixtral"}
"""The family that has the same attention."""


@dataclass(frozen=True)
class UpcycleOptions:
    num_experts: int = 8
    granularity: int = 1
    """Slices that a copy of the dense layer is cut into; 1 keeps it whole."""
    shared_expert_hidden_size: int | None = None
    """Inner units that go to a shared expert; null for none."""
    layers: list[int] | None = None
    """Layers that get experts; null for all. The others stay dense."""
    noise: float = 0.0
    """Standard deviation of noise on each expert's weights, as a fraction of that of the dense matrix. Above 0 the
    output is no longer that of the dense model."""
    gate_std: float = 0.02
    """Standard deviation of the gate's matrices."""
    seed: int = 0


Read = Callable[[str], Tensor]
"""A tensor of the dense model by its name."""


@dataclass(frozen=True)
class Upcycling:
    """What becomes of a dense model. Tensors are made one at a time."""

    dense: ModelOptions
    model: ModelOptions
    router: RouterOptions
    options: UpcycleOptions

    def tensors(self) -> Iterator[tuple[str, Callable[[Read], Tensor]]]:
        """Name -> how to make it, for all layers that get experts; everything else is as in the dense model."""
        for layer in moe_layer_numbers(self.model):
            prefix = f"decoder.layers.{layer}.mlp."
            for which in ("weight1", "weight2"):
                yield f"{prefix}experts.{which}", _Experts(self, prefix, which)
                if self.options.shared_expert_hidden_size is not None:
                    yield f"{prefix}shared_experts.{which}", _Shared(self, prefix, which)
            for name, value in self._gate(prefix + "router.gate").items():
                yield name, lambda _, value=value: value  # type: ignore[misc]
            if self.router.balancing.bias.rate > 0:
                yield f"{prefix}router.bias_E", lambda _: torch.zeros(self.options.num_experts)

    def dtype(self, name: str, dense: torch.dtype) -> torch.dtype:
        """In which a tensor that is made is stored: as the dense layers (``dense``), or float32 where the product with
        ``factor`` would be rounded to a shorter type. A power of two changes the exponent only. A gate's buffers keep
        their own type."""
        gate = blank_gate(self.router.gate, self.router.options, self.options.num_experts)
        if own := {n: b.dtype for n, b in gate.named_buffers()}.get(name.partition(".router.gate.")[2]):
            return own
        rounded = name.endswith(".experts.weight2") and math.frexp(self.factor)[0] != 0.5
        return torch.float32 if name.endswith("bias_E") or (rounded and dense.itemsize < 4) else dense

    def replaced(self) -> set[str]:
        """Names of the dense model that are not in the new one."""
        layers = moe_layer_numbers(self.model)
        return {f"decoder.layers.{layer}.mlp.{which}" for layer in layers for which in ("weight1", "weight2")}

    @property
    def factor(self) -> float:
        """On the down projections."""
        total = _gate_of(self.router, self.model).weight_sum
        assert total is not None
        return self.options.granularity / total

    @property
    def routed(self) -> slice:
        """Inner units that the experts share out."""
        return slice(self.options.shared_expert_hidden_size or 0, self.dense.ffn_hidden_size)

    def gate_is_finite(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self._gate("gate").values())

    def chooses_whole_copies(self) -> bool:
        """Whether it does so with equal weights for some random tokens."""
        tokens, options = 64, self.options
        gate = _gate_of(self.router, self.model)
        gate.load_state_dict({name.removeprefix("gate."): value for name, value in self._gate("gate").items()})
        nothing_T = torch.zeros(tokens, dtype=torch.int64)
        each_T = torch.arange(tokens)
        batch = TokenBatch(nothing_T, each_T, each_T, nothing_T.bool(), tokens, 1)
        x_TH = torch.randn(tokens, self.model.hidden_size, generator=torch.Generator().manual_seed(options.seed))
        bias_E = torch.zeros(options.num_experts) if self.router.balancing.bias.rate > 0 else None
        with torch.no_grad():
            weights_TE = gate(x_TH, batch, bias_E=bias_E).weights_TE
        copies = weights_TE.view(tokens, -1, options.granularity)
        return bool(((copies - copies[..., :1]).abs() <= 1e-6).all())

    def _gate(self, name: str) -> dict[str, Tensor]:
        gate = _gate_of(self.router, self.model)
        values = initial_gate(gate, name, self.options.seed, self.options.gate_std)
        for own in gate.expert_rows:
            rows_E = torch.arange(self.options.num_experts) // self.options.granularity * self.options.granularity
            values[f"{name}.{own}"] = values[f"{name}.{own}"][rows_E]
        for own in gate.shift_parameters:
            values[f"{name}.{own}"] = torch.zeros_like(values[f"{name}.{own}"])
        return values


def plan(dense: ModelOptions, router: RouterOptions, options: UpcycleOptions) -> Upcycling:
    """What the model will be. Errors: ValueError where it cannot keep the dense model's output at the start."""
    if family_of(dense).experts or dense.ffn_hidden_size is None:
        raise ValueError(f"only a dense model can be upcycled ({', '.join(FAMILY_WITH_EXPERTS)}), not {dense.family}")
    for name, value in (("noise", options.noise), ("gate_std", options.gate_std)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is a standard deviation: a finite number of at least 0, not {value}")
    layers = list(range(dense.num_layers)) if options.layers is None else sorted(options.layers)
    unknown = [layer for layer in layers if not 0 <= layer < dense.num_layers]
    if unknown or not layers:
        raise ValueError(f"layers must name some of 0 to {dense.num_layers - 1}, not {unknown or 'none'}")
    if options.granularity < 1:
        raise ValueError(f"granularity is a number of slices, at least 1, not {options.granularity}")
    if not -(2**63) <= options.seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits, unlike {options.seed}")
    routed = dense.ffn_hidden_size - (options.shared_expert_hidden_size or 0)
    if routed < 1 or routed % options.granularity:
        raise ValueError(
            f"{routed} inner units are left for the experts (of {dense.ffn_hidden_size}); they must be cut into"
            f" {options.granularity} equal slices: choose another granularity or another width of the shared expert"
        )
    if options.num_experts < 1:
        raise ValueError(f"there must be at least 1 expert, not {options.num_experts}")
    if options.num_experts % options.granularity:
        raise ValueError(f"{options.num_experts} experts cannot hold whole sets of {options.granularity} slices each")
    left_dense = [layer for layer in range(dense.num_layers) if layer not in layers]
    moe = dataclasses.replace(
        dense.moe,
        num_experts=options.num_experts,
        expert_hidden_size=routed // options.granularity,
        shared_expert_hidden_size=options.shared_expert_hidden_size,
    )
    model = dataclasses.replace(
        dense,
        family=FAMILY_WITH_EXPERTS[dense.family],  # type: ignore[arg-type]
        dense_layers=left_dense,
        ffn_hidden_size=dense.ffn_hidden_size if left_dense else None,
        moe=moe,
    )
    check_options(router, options.num_experts)
    gate = _gate_of(router, model)
    if gate.weight_sum is None:
        raise ValueError(
            f"gate {router.gate!r} with these options gives combine weights whose sum differs from token to token, so "
            "that the upcycled model would not begin with the dense one's output: choose options that normalise them"
        )
    if options.granularity > 1 and (gate.max_k is None or gate.max_k % options.granularity or not gate.expert_rows):
        raise ValueError(
            f"slices of one copy must be chosen together: gate {router.gate!r} needs a fixed number of experts per"
            f" token that is a multiple of granularity {options.granularity}"
        )
    if options.granularity > 1 and router.forced_balance:
        # Whatever the gate would choose: the turn goes by single experts.
        raise ValueError(
            f"router.forced_balance takes experts by turn, not the {options.granularity} slices of a copy together, so "
            "that the upcycled model would not begin with the dense one's output: set it to false, or granularity to 1"
        )
    found = Upcycling(dense, model, router, options)
    if not found.gate_is_finite():
        raise ValueError(f"gate_std {options.gate_std} is too large: float32 does not hold such weights")
    if not found.chooses_whole_copies():
        raise ValueError(f"gate {router.gate!r} with these options does not choose the slices of a copy together")
    return found


def _gate_of(router: RouterOptions, model: ModelOptions) -> Gate:
    return build_gate(router.gate, router.options, model.hidden_size, model.moe.num_experts)


@dataclass(frozen=True)
class _Experts:
    """All experts of a layer: [E, 2F, H] or [E, H, F]."""

    plan: Upcycling
    prefix: str
    which: str

    def __call__(self, read: Read) -> Tensor:
        options = self.plan.options
        dense = read(self.prefix + self.which)
        dense = dense.to(self.plan.dtype(f"{self.prefix}experts.{self.which}", dense.dtype))
        if self.which == "weight1":
            slices = [torch.cat(pair) for pair in zip(*self._parts(dense), strict=True)]
        else:
            slices = [part * self.plan.factor for part in dense[:, self.plan.routed].chunk(options.granularity, dim=1)]
        result = dense.new_empty(options.num_experts, *slices[0].shape)
        for expert in range(options.num_experts):
            result[expert] = slices[expert % options.granularity]
            if options.noise:
                name = f"{self.prefix}experts.{self.which}"
                noise = noise_of_expert(options.seed, name, expert, slices[0].shape)
                result[expert] += noise.to(dense.dtype) * (options.noise * dense.float().std() * self._noise_factor)
                if not result[expert].isfinite().all():
                    raise ValueError(f"noise {options.noise} is too large: {dense.dtype} does not hold such weights")
        return result

    def _parts(self, dense: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Gate projection, then up projection, cut into slices."""
        for rows in dense.chunk(2):
            yield rows[self.plan.routed].chunk(self.plan.options.granularity)

    @property
    def _noise_factor(self) -> float:
        return self.plan.factor if self.which == "weight2" else 1.0


@dataclass(frozen=True)
class _Shared:
    """The first inner units: [2F, H] or [H, F]."""

    plan: Upcycling
    prefix: str
    which: str

    def __call__(self, read: Read) -> Tensor:
        dense, width = read(self.prefix + self.which), self.plan.options.shared_expert_hidden_size
        if self.which == "weight2":
            return dense[:, :width].contiguous()
        return torch.cat([rows[:width] for rows in dense.chunk(2)])
