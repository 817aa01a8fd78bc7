"""Experts by token id, from a fixed and even table.

Suffixes: T tokens, H hidden, E experts, K chosen, V token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from moe_train.routing.arithmetic import gate_dtype
from moe_train.routing.gates.hash_table import counted_table, even_table, read_counts
from moe_train.routing.interface import Gate, Routing, TokenBatch
from moe_train.routing.registry import register_gate
from moe_train.routing.topk import check_top_k_fits, mask_of, slots, top_k


@dataclass(frozen=True)
class HashOptions:
    vocab_size: int = 32768
    """Token ids in the table; a run must set it to model.vocab_size."""
    top_k: int = 1
    seed: int | None = None
    """A number gives every layer the table of that number. Null: each layer draws its own when a model is
    initialised, from the run's seed."""
    counts: str | None = None
    """JSON file with the number of times that each token id occurs; null takes all ids as equally frequent."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.counts == "":
            raise ValueError("counts names no file: give a path, or null")


@register_gate("hash", HashOptions)
class HashGate(Gate):
    """The k experts that ``table`` [V, K] holds for the token's id; weights 1/k. No parameters, nothing is learned.

    Without ``counts`` the table is random and even over ids. With ``counts`` it is built from the most frequent id on,
    each time with the experts that have the least so far, which evens out the load itself. The table is a buffer, part
    of checkpoints and exports: the file is read only when a model is initialised, and where it does not exist any more
    (evaluation elsewhere) the checkpoint brings the table. An id outside of [0, V) takes the row of id mod V.
    Shapes: ids [T], weights [T, E]; logits are 0 and probabilities 1/E, so that no balancing piece makes sense. Time
    and memory O(T E). Source: Roller et al. 2021 (arXiv 2106.04426): eq. 2 (k = 1, weight 1), "balanced assignment" in
    section 3. k > 1 is ours: k whole experts, where the paper's MultiHash puts one expert together from parts of k.
    """

    table: Tensor
    reads_hidden = False
    takes_switch_loss = False
    takes_z_loss = False
    ties = "none"
    state_follows = MappingProxyType({"table": "nothing"})
    weight_sum = 1.0

    def __init__(self, hidden_size: int, num_experts: int, options: HashOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options = options or HashOptions()
        check_top_k_fits(options.top_k, num_experts)
        self.max_k = options.top_k
        self.vocab_size = options.vocab_size
        whose = "a new run with" if options.counts is None else "another file, of this run's own training data, for"
        self.remedies = (
            f"{whose} router.options.counts, the number of times that each token id occurs (moe-train inspect DATA"
            " --token-counts FILE)",
        )
        self.initial_files = () if options.counts is None else (options.counts,)
        self.register_buffer("table", torch.empty(options.vocab_size, options.top_k, dtype=torch.int64))
        if not self.table.is_meta:
            generator = torch.Generator().manual_seed(options.seed or 0)
            self.table.copy_(even_table(options.vocab_size, options.top_k, num_experts, generator))

    def initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        options = self.options
        if name != "table":
            return None
        if options.seed is not None:
            generator = torch.Generator().manual_seed(options.seed)
        if options.counts is not None and Path(options.counts).is_file():
            counts_V = read_counts(options.counts, options.vocab_size)
            table_VK = counted_table(counts_V, options.top_k, self.num_experts, generator)
        else:
            table_VK = even_table(options.vocab_size, options.top_k, self.num_experts, generator)
        return table_VK.float()  # exact up to 2^24 experts

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        assert bias_E is None, "hash takes no bias"
        experts_TK = self.table[torch.remainder(batch.ids_T.long(), self.table.shape[0])]
        logits_TE = torch.zeros(
            experts_TK.shape[0], self.num_experts, dtype=gate_dtype(tokens_TH), device=tokens_TH.device
        )
        selected_TE = replay_TE
        if selected_TE is None:
            selected_TE = mask_of(experts_TK, self.num_experts) & ~batch.padding_T[:, None]
        # By rising index, also in recomputation, where the selection is all that there is.
        experts_TK = top_k(logits_TE, self.options.top_k, among_TE=selected_TE)
        return Routing(
            logits_TE=logits_TE,
            probs_TE=logits_TE + 1 / self.num_experts,
            weights_TE=selected_TE.to(logits_TE.dtype) / self.options.top_k,
            selected_TE=selected_TE,
            kept_TE=selected_TE,
            experts_TK=slots(experts_TK, selected_TE),
        )
