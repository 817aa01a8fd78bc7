"""The one interface between a router variant and the rest of the system.

Dimension suffixes used in this package: T tokens of a micro-batch (flattened from [S, B], so token t = s * B + b),
H hidden, E experts, K chosen experts per token, S sequence length, B sequences.

This room imports torch and the standard library only, so that one gate can be taken into another project.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from moe_train.routing.noise import counter_normal

POOLS = ("token", "sequence", "micro_batch")
TIES = ("expert", "token", "none")
FOLLOWS = ("counts", "floats", "steps", "nothing")
UNITS = ("token", "sequence", "micro_batch", "multi_token")


@dataclass(frozen=True)
class TokenBatch:
    """What a gate may know about a micro-batch besides the hidden states.

    ``sample_T`` is the global sample index, ``position_T`` the offset inside the sample (never reset at a document
    boundary) and ``padding_T`` is True for PADDING: such a token is never selected, counted or dropped.
    """

    ids_T: Tensor
    sample_T: Tensor
    position_T: Tensor
    padding_T: Tensor
    sequence_length: int
    batch_size: int
    seed: int = 0
    step: int = 0
    window_sum: Callable[[str, int, Tensor], Tensor] | None = None
    """``window_sum(name, layer, x)``: x summed (detached) over the data-parallel ranks and over the micro-batches of
    this optimizer step seen so far. None means one process and one micro-batch: x itself."""

    def noise(self, name: str, layer: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise [T, *shape], a pure function of (seed, step, layer, name, sample, position), so it is
        the same under every layout and in recomputation."""
        return counter_normal(name, (self.seed, self.step, layer), self.sample_T, self.position_T, shape)

    def sum_over_window(self, name: str, layer: int, x: Tensor) -> Tensor:
        """``window_sum`` or, without one, x itself; always detached."""
        return x.detach() if self.window_sum is None else self.window_sum(name, layer, x.detach())


@dataclass(frozen=True)
class LossTerm:
    """One auxiliary loss of one layer and one micro-batch as a (sum, count) pair.

    The loss of the optimizer step is ``coefficient * (sum of sums) / (sum of counts)`` over all ranks and
    micro-batches, so that averages are exact under every split. ``unit`` says what is counted: non-padding tokens,
    sequences that hold one, or micro-batches that hold one (gates use these), or targets of the model's own multi-token
    prediction; the trainer knows these totals before the step starts.
    """

    sum: Tensor
    count: Tensor
    unit: str
    coefficient: float

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit of a loss term is {self.unit!r}; it must be one of {', '.join(UNITS)}")


@dataclass
class Routing:
    """The decision of a gate for T tokens and E experts."""

    logits_TE: Tensor
    """float32 scores before any normalisation."""
    probs_TE: Tensor
    """float32 probabilities over all experts (what balancing losses average)."""
    weights_TE: Tensor
    """float32 combine weights, zero where not selected."""
    selected_TE: Tensor
    """bool, before capacity; any number per row, also none."""
    kept_TE: Tensor
    """bool, after capacity."""
    losses: dict[str, LossTerm] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Additive statistics of this micro-batch: ``load`` (exact int64 [E], pre-drop, padding excluded), ``tokens``
    (int64 scalar) and whatever ``after_step`` needs. Summed over micro-batches and ranks once per step."""
    expert_input_shift_TH: Tensor | None = None
    """Added to the routed experts' input only (LPR)."""
    experts_TK: Tensor | None = None
    """int64 chosen experts, E in an unused slot; given by gates whose ``max_k`` is not None, for the path with fixed
    shapes. Must say the same as ``kept_TE``."""


class Gate(nn.Module):
    """Scores and selects experts. ``forward`` is pure: no buffer writes, no ``.item()``, no collective except through
    ``TokenBatch.sum_over_window``."""

    causal: bool = True
    """False when an output depends on a later token."""
    pool: str = "token"
    """The tokens that compete with each other: token, sequence or micro_batch."""
    inference_rule: str | None = None
    """For a gate whose tokens compete: what it does in evaluation mode instead, so that a token's routing depends on no
    other token; in words, for messages. None: it does the same as in training."""
    max_k: int | None = None
    """Static bound on experts per token (fixed shapes, fast path); None means free."""
    varies_k: bool = False
    """Whether tokens can have different numbers of experts, before capacity; False: ``max_k`` each."""
    takes_bias: bool = False
    """Whether a selection bias makes sense for this gate."""
    takes_switch_loss: bool = True
    """Whether the switch loss makes sense for this gate (probs_TE is a distribution)."""
    takes_z_loss: bool = True
    """Whether the z-loss makes sense for this gate (logits_TE are scores that it learns)."""
    takes_capacity: bool = True
    """Whether a capacity makes sense for this gate; False where experts choose a set number of tokens."""
    balance_options: tuple[str, ...] = ()
    """The gate's own options that even out the load where they are larger: what the collapse alarm says to try."""
    remedies: tuple[str, ...] = ()
    """What else evens out the load, by this gate's options, in words: what the collapse alarm says to try first."""
    reads_hidden: bool = True
    """False for a gate whose decisions and weights depend on no hidden state (token ids or noise alone)."""
    ties: str = "expert"
    """Who is chosen among equal scores. expert: the lower expert index; token: where experts choose tokens, the earlier
    token of the pool; none: the choice does not follow the scores alone."""
    evaluation_ties: str | None = None
    """The same in evaluation mode; None: as in training."""
    weights_vanish: bool = False
    """Whether a token's combine weights sum to less than ``weight_sum``, down to 0, where the scores of all experts
    that it selected vanish, because nothing but a small constant is left to divide by."""
    synchronises: bool = False
    """Whether ``forward`` waits for the device (values are read on the host)."""
    expert_rows: tuple[str, ...] = ()
    """Parameters with a row per expert: experts with equal rows get equal scores. What upcycling needs to know."""
    vocab_size: int | None = None
    """Token ids that it has an entry for, which must be those of the model; None where it reads no ids."""
    initial_files: tuple[str, ...] = ()
    """Files that ``initial`` reads: a training needs them; where a checkpoint is loaded they may be gone."""
    state_follows: Mapping[str, str] = MappingProxyType({})
    """What moves each buffer that the gate may have, by its name. counts: whole numbers, so that it has the same bits
    under every layout; floats: sums that every layout rounds in its own way; steps: it counts the optimizer steps of
    this run, so that a run that begins with another's weights begins at 0; nothing: it stays as it was built."""
    sum_units: Mapping[str, float] = MappingProxyType({})
    """Integers of ``Routing.sums`` that are rounded floats, by name: the unit that they are whole multiples of."""
    shift_parameters: tuple[str, ...] = ()
    """Parameters that, when they are zero, make ``expert_input_shift_TH`` zero."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.layer = 0
        """Index of the layer, from 0; set by the owner, used for noise and window sums."""

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        """``bias_E`` is added to the scores for selection only, never to the combine weights. ``replay_TE`` is the
        selection of the first pass, to be used as it is when activations are recomputed."""
        raise NotImplementedError

    @property
    def mean_k(self) -> float | None:
        """Experts per token of the training, on average, as far as the options say it; None where the data decide."""
        return None if self.varies_k or self.max_k is None else float(self.max_k)

    @property
    def weight_sum(self) -> float | None:
        """What the combine weights of every token sum to; None where that is not always the same."""
        return None

    def products_per_token(self) -> int:
        """Multiply-adds of one token in the matrix products of ``forward``: what FLOPs count. Losses, statistics and
        element-wise work are left out, and so is what is done once for all tokens. Here each matrix once."""
        return sum(p.numel() for p in self.parameters() if p.dim() > 1)

    def after_step(self, sums: dict[str, Tensor]) -> None:
        """Move state that follows a rule; called once per optimizer step that was taken, never in evaluation, with
        the sums over all ranks and micro-batches."""

    def initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """Initial value (float32, CPU, drawn from ``generator``) of the gate's parameter or buffer ``name``, or None: a
        parameter then follows the model's rule (normal(0, init.std) for matrices, ones for norm weights, zeros for
        biases), a buffer stays as it was built."""
        return None

    def no_decay_parameters(self) -> set[str]:
        """Names (within this gate) of parameters that get no weight decay besides norms and biases."""
        return set()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        # State that moves by rule stays float32 when the engine casts the module to bfloat16.
        keep_buffers_float32(self, lambda: super(Gate, self)._apply(fn, recurse))
        return self


def keep_buffers_float32(module: nn.Module, apply: Callable[[], nn.Module]) -> nn.Module:
    """Runs ``apply`` (a Module._apply) and gives the module's own float32 buffers their values back at full
    precision, on the device that they were moved to."""
    before = {n: b for n, b in module._buffers.items() if b is not None and b.dtype == torch.float32}
    result = apply()
    for name, old in before.items():
        new = module._buffers[name]
        assert new is not None
        if new.dtype != torch.float32:
            module._buffers[name] = old.to(new.device)
    return result
