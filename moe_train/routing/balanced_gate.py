"""A gate together with its balancing: what an MoE layer owns.

Suffixes: T tokens, H hidden, E experts, S sequence, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_train.routing.balancing import importance_loss, move_bias, switch_loss, z_loss
from moe_train.routing.capacity import apply_capacity, rows_per_expert
from moe_train.routing.interface import Routing, TokenBatch, keep_buffers_float32
from moe_train.routing.options import RouterOptions
from moe_train.routing.registry import build_gate, check_options
from moe_train.routing.round_robin import round_robin
from moe_train.routing.schedule import is_on, value_at
from moe_train.routing.scopes import TokenSets
from moe_train.routing.scores import z_sum
from moe_train.routing.statistics import k_histogram

_LARGEST = 1e4
"""Hidden states are far below it; products of larger ones may overflow."""


class BalancedGate(nn.Module):
    """The gate of ``options``, plus its balancing losses, selection bias, capacity and the counts of the micro-batch.

    ``gate`` is the gate; ``bias_E`` a float32 buffer, None where the bias is off. The routing that comes back has the
    gate's own losses and ``switch``, ``z``, ``importance``, all before capacity, and the sums ``load`` and ``kept``
    (int64 [E], before and after capacity), ``tokens`` (int64 scalar) and, where it makes sense, ``z`` (float64, the
    sum of the z-loss) and ``k_histogram`` (int64 [E + 1], tokens by their number of experts), padding excluded.
    """

    bias_E: Tensor | None

    def __init__(self, options: RouterOptions, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        check_options(options, num_experts)
        self.options = options
        self.num_experts = num_experts
        self.gate = build_gate(options.gate, options.options, hidden_size, num_experts)
        bias = torch.zeros(num_experts, dtype=torch.float32) if options.balancing.bias.rate > 0 else None
        self.register_buffer("bias_E", bias)

    @property
    def state_follows(self) -> dict[str, str]:
        """As ``Gate.state_follows``, with the bias and under the names that buffers have here."""
        return {"bias_E": "counts"} | {f"gate.{name}": moves for name, moves in self.gate.state_follows.items()}

    @property
    def layer(self) -> int:
        """Index of the layer, from 0."""
        return self.gate.layer

    @layer.setter
    def layer(self, layer: int) -> None:
        self.gate.layer = layer

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        replay_TE: Tensor | None = None,
        replay_kept_TE: Tensor | None = None,
    ) -> Routing:
        """Routes T tokens [T, H]. Pure: the bias moves in ``after_step`` only. Whatever stands in a padding position,
        also what is not finite, reaches neither losses nor sums nor gradients.

        ``replay_TE`` is the selection of the first pass, for recomputation, ``replay_kept_TE`` what capacity left of
        it. ``batch.window_sum`` is asked again there and must answer what it answered in the first pass.
        """
        if self.options.forced_balance and replay_TE is None:
            assert self.gate.max_k is not None
            replay_TE = round_robin(batch, self.gate.max_k, self.num_experts)
        # Zeros from the start: later on a gradient of 0 times a NaN would still be a NaN in the gate's weights.
        unused_TH = batch.padding_T[:, None]
        if not self.training:
            # Ordinary numbers stay: an evaluation meters what the gate would choose for padding, as was published.
            unused_TH = unused_TH & ~(tokens_TH.abs() < _LARGEST)
        tokens_TH = tokens_TH.masked_fill(unused_TH, 0.0)
        routing = self.gate(tokens_TH, batch, bias_E=self.bias_E, replay_TE=replay_TE)
        self._add_losses(routing, batch)
        if (factor := self.capacity_factor) is not None:
            apply_capacity(routing, batch, self.options.capacity, factor, self.gate.max_k, replay_kept_TE)
            routing.sums["kept"] = routing.kept_TE.sum(0, dtype=torch.int64)
        return routing

    @property
    def capacity_factor(self) -> float | None:
        """Of the mode, training or evaluation; None where nothing is dropped."""
        capacity = self.options.capacity
        return capacity.factor if self.training else capacity.evaluation_factor

    def padded_rows(self, batch: TokenBatch) -> int | None:
        """Rows that each expert computes for this micro-batch, whatever it was given; None: those that it was given."""
        if not self.training:
            return None
        return rows_per_expert(self.options.capacity, self.gate.max_k, batch, self.num_experts)

    def _add_losses(self, routing: Routing, batch: TokenBatch) -> None:
        load_BE, balancing = self._count(routing, batch), self.options.balancing
        if self.gate.takes_z_loss:
            routing.sums["z"] = z_sum(routing.logits_TE, batch.padding_T)
        if is_on(balancing.switch_loss.coefficient):
            routing.losses["switch"] = switch_loss(routing.probs_TE, load_BE, batch, self.layer, balancing.switch_loss)
        if is_on(balancing.z_loss):
            routing.losses["z"] = z_loss(routing.logits_TE, batch, balancing.z_loss)
        if is_on(balancing.importance_loss.coefficient):
            options = balancing.importance_loss
            amounts_TE = routing.probs_TE if options.of == "probabilities" else routing.weights_TE
            sets, coefficient = TokenSets(batch, options.scope), value_at(options.coefficient, batch.step)
            routing.losses["importance"] = importance_loss(amounts_TE, sets, self.layer, coefficient)

    def _count(self, routing: Routing, batch: TokenBatch) -> Tensor:
        """Adds the counts before capacity to ``routing.sums``; returns the load per sequence, int64 [B, E]."""
        shape = (batch.sequence_length, batch.batch_size, self.num_experts)
        load_BE = routing.selected_TE.view(shape).sum(0, dtype=torch.int64)
        load_E = load_BE.sum(0)
        routing.sums["load"] = load_E
        # A gate may drop slots itself; capacity counts again.
        same = routing.kept_TE is routing.selected_TE
        routing.sums["kept"] = load_E if same else routing.kept_TE.sum(0, dtype=torch.int64)
        routing.sums["tokens"] = (~batch.padding_T).sum()
        if self.gate.varies_k:
            routing.sums["k_histogram"] = k_histogram(routing.selected_TE, batch.padding_T)
        return load_BE

    def after_step(self, sums: dict[str, Tensor]) -> None:
        """Moves the bias and the gate's own state; once per optimizer step that was taken, with the sums of the whole
        step over all ranks and micro-batches."""
        if self.bias_E is not None:
            move_bias(self.bias_E, sums["load"], self.options.balancing.bias)
        self.gate.after_step(sums)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BalancedGate:
        keep_buffers_float32(self, lambda: super(BalancedGate, self)._apply(fn, recurse))
        return self
