"""The MoE layer: gate, dispatch, experts, combine. It stands where megatron-core's own MoE layer would.

Under tensor parallelism every rank routes all tokens of the micro-batch, since gates, capacity and losses may look at
whole sequences, and then sends its own ones to the experts. The shared expert is divided, the routed ones are not.

Suffixes: S sequence, B batch, T = S * B tokens, H hidden, E experts; s and t are those of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_train.model import dispatch
from moe_train.model.expert_parallel import AllToAll
from moe_train.model.experts.module import Experts
from moe_train.model.feed_forward import FeedForward
from moe_train.model.micro_batch import MicroBatch, attach_losses, current
from moe_train.model.options import MoEOptions
from moe_train.model.sequence_parallel import SequenceParallel
from moe_train.model.upstream import MegatronModule
from moe_train.routing.balanced_gate import BalancedGate
from moe_train.routing.options import RouterOptions


class MoELayer(MegatronModule):
    """y = shared(x) + sum over the kept experts e of w_e * expert_e(x + shift).

    The whole layer is one unit for ZeRO-3 (a leaf module): a gate may then return any structure.
    """

    def __init__(
        self,
        config: Any,
        *,
        moe: MoEOptions,
        router: RouterOptions,
        layer_number: int | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.sequence = SequenceParallel(pg_collection.tp)
        self.expert_parallel_size = pg_collection.ep.size()
        num_local = moe.num_experts // self.expert_parallel_size
        first = pg_collection.ep.rank() * num_local
        self.router = BalancedGate(router, config.hidden_size, moe.num_experts)
        self.experts = Experts(num_local, first, config.hidden_size, moe.expert_hidden_size, moe.experts)
        self.shared_experts: FeedForward | None = None
        if moe.shared_expert_hidden_size is not None:
            self.shared_experts = FeedForward(config.hidden_size, moe.shared_expert_hidden_size, pg_collection.tp)
        self.all_to_all: AllToAll | None = None
        if self.expert_parallel_size > 1:
            self.all_to_all = AllToAll(config, pg_collection, first, num_local)
        if layer_number is not None:
            self.set_layer_number(layer_number)

    def set_layer_number(self, layer_number: int) -> None:
        """Called by megatron-core, which counts layers from 1."""
        self.layer = layer_number - 1
        self.router.layer = self.layer

    def forward(self, hidden_sBH: Tensor, padding_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """Returns the layer's output [s, B, H] and no bias. Padding comes with the micro-batch, not by this mask."""
        micro_batch = current()
        hidden_SBH, x_tH = self.sequence.gather(hidden_sBH), hidden_sBH.reshape(-1, hidden_sBH.shape[-1])
        x_TH = hidden_SBH.reshape(-1, hidden_SBH.shape[-1])
        routing = self.router(x_TH, micro_batch.tokens, **self._replay(micro_batch))
        self._collect(routing, micro_batch)
        own, experts_in_tH = self.sequence.own_tokens(routing), x_tH
        if own.expert_input_shift_TH is not None:
            experts_in_tH = x_tH + own.expert_input_shift_TH.to(x_tH.dtype)
        y_tH = self._routed(experts_in_tH, own, self.router.padded_rows(micro_batch.tokens))
        # Each rank has the losses of all tokens, and gradients are summed over the ranks.
        y_tH = attach_losses(y_tH, routing.losses, micro_batch, share=1 / self.sequence.ranks)
        y_sBH = y_tH.view(hidden_sBH.shape)
        if self.shared_experts is not None:
            y_sBH = y_sBH + self.sequence.scatter_sum(self.shared_experts(hidden_SBH))
        return y_sBH, None

    def _routed(self, x_tH: Tensor, routing: Any, padded_rows: int | None) -> Tensor:
        if self.all_to_all is not None:
            return self.all_to_all(x_tH, routing.weights_TE, routing.kept_TE, self.experts, padded_rows)
        permutation = dispatch.make_permutation(routing, padded_rows)
        rows_RH, weights_R = dispatch.permute(x_tH, routing.weights_TE, permutation)
        return dispatch.combine(self.experts(rows_RH, permutation.counts_E, weights_R), permutation)

    def _replay(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        if not micro_batch.recomputing:
            return {}
        replayed = {"replay_TE": micro_batch.selections[self.layer]}
        if self.layer in micro_batch.kept:
            replayed["replay_kept_TE"] = micro_batch.kept[self.layer]
        return replayed

    def _collect(self, routing: Any, micro_batch: MicroBatch) -> None:
        """Statistics and losses of the first pass; a recomputation adds nothing."""
        if micro_batch.recomputing:
            return
        if micro_batch.recompute:
            micro_batch.selections[self.layer] = routing.selected_TE
            if routing.kept_TE is not routing.selected_TE:
                micro_batch.kept[self.layer] = routing.kept_TE
        micro_batch.sums[self.layer] = {name: value.detach() for name, value in routing.sums.items()}
        micro_batch.losses[self.layer] = {
            name: type(term)(term.sum.detach(), term.count.detach(), term.unit, term.coefficient)
            for name, term in routing.losses.items()
        }
        if micro_batch.keep_routings:
            micro_batch.routings[self.layer] = routing


def moe_layers(model: torch.nn.Module) -> list[MoELayer]:
    """The model's MoE layers in order."""
    return sorted((m for m in model.modules() if isinstance(m, MoELayer)), key=lambda m: m.layer)
