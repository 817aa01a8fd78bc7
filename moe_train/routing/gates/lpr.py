"""Latent prototype routing: similarity to prototypes in a small latent space.

Suffixes: T tokens, H hidden, D latent, E experts, K chosen, G token sets (scopes.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.routing.arithmetic import full_precision, gate_dtype, softmax_over
from moe_train.routing.gates.lpr_distances import GAUSSIAN_DISTANCES
from moe_train.routing.gates.lpr_diversity import latent_diversity, prototype_diversity
from moe_train.routing.gates.lpr_ema import ema_sums, move_prototypes
from moe_train.routing.gates.lpr_losses import kl_to_standard_normal, prototype_alignment, published_shares
from moe_train.routing.gates.lpr_options import LatentPrototypeOptions
from moe_train.routing.gates.lpr_similarity import Gaussians, build_similarity, similarity_products
from moe_train.routing.interface import Gate, LossTerm, Routing, TokenBatch
from moe_train.routing.registry import register_gate
from moe_train.routing.schedule import bounds, value_at
from moe_train.routing.scopes import TokenSets
from moe_train.routing.topk import check_top_k_fits, select_top_k


@register_gate("lpr", LatentPrototypeOptions)
class LatentPrototypeGate(Gate):
    """a = SiLU(LayerNorm(x)); (mu, logvar) = W_enc a + b_enc; s_e = similarity of mu (and logvar) to prototype e; the k
    largest s + bias; weights = softmax of the selected raw scores; experts see x + W_dec (softmax_E(s) P) + b_dec.

    Shapes: x [T, H], ``prototypes`` [E, D], ``encoder`` [2D, H], ``decoder`` [H, D]. Time O(T D (H + E)), memory
    O(T (H + E)); ``diversity: euclidean`` takes O(D) more per pair of tokens of a set. Scores: lpr_similarity.py;
    losses: lpr_losses.py, lpr_diversity.py. Source: Yang 2025 (arXiv 2506.21328).

    Scores use mu, so that the method's latent sample z = mu + exp(logvar / 2) * noise reaches no routing; ``mode:
    published`` draws it for the target of the alignment, ``paper`` uses mu there, too. With a similarity of points
    logvar learns from the KL alone. Frozen prototypes, and those that follow a moving average, are float32 buffers:
    parameters that a rule overwrites would get their old values back from the optimizer's own float32 copies, and a
    move in bfloat16 would be lost in rounding. Losses that only prototypes could learn from are then left out.
    """

    takes_bias = True
    balance_options = ("coefficient",)
    weight_sum = 1.0
    prototypes: Tensor
    prototype_logvar: Tensor | None
    prototype_mass: Tensor

    def __init__(self, hidden_size: int, num_experts: int, options: LatentPrototypeOptions | None = None) -> None:
        super().__init__(hidden_size, num_experts)
        self.options = options = options or LatentPrototypeOptions()
        check_top_k_fits(options.top_k, num_experts)
        self.max_k = options.top_k
        latent = options.latent_dim
        self.norm = nn.LayerNorm(hidden_size)
        self.encoder = nn.Linear(hidden_size, 2 * latent)
        nn.init.normal_(self.encoder.weight, std=0.02)
        nn.init.zeros_(self.encoder.bias)
        self.decoder: nn.Linear | None = None
        if options.input_shift:
            self.decoder = nn.Linear(latent, hidden_size)
            nn.init.normal_(self.decoder.weight, std=0.02)
            nn.init.zeros_(self.decoder.bias)
            self.shift_parameters = ("decoder.weight", "decoder.bias")
        self.similarity = build_similarity(options.similarity, latent, options.sigma)
        state = {"prototypes": self._placed(torch.randn(num_experts, latent))}
        if options.similarity in GAUSSIAN_DISTANCES:
            state["prototype_logvar"] = torch.zeros(num_experts, latent)
        else:
            self.prototype_logvar = None
        for name, value in state.items():
            if options.prototypes == "learned":
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        if options.prototypes == "ema":
            self.register_buffer("prototype_mass", torch.ones(num_experts))
            state["prototype_mass"] = self.prototype_mass
            self.remedies = ("router.options.prototypes: learned (averages leave experts without tokens behind)",)
        self.expert_rows = tuple(state)
        if options.prototypes != "learned":
            self.state_follows = dict.fromkeys(state, "nothing" if options.prototypes == "frozen" else "floats")

    def forward(
        self,
        tokens_TH: Tensor,
        batch: TokenBatch,
        *,
        bias_E: Tensor | None = None,
        replay_TE: Tensor | None = None,
    ) -> Routing:
        dtype = gate_dtype(tokens_TH, self.encoder.weight)
        with full_precision(tokens_TH):
            latents = self._encode(tokens_TH.to(dtype))
            logvar_ED = None if self.prototype_logvar is None else self.prototype_logvar.to(dtype)
            prototypes = Gaussians(self.prototypes.to(dtype), logvar_ED)
            logits_TE = self.similarity(latents, prototypes)
            probs_TE = torch.softmax(logits_TE, dim=-1)
            shift_TH = None
            if self.decoder is not None:
                mixture_TD = probs_TE @ prototypes.mean_ND
                shift_TH = F.linear(mixture_TD, self.decoder.weight.to(dtype), self.decoder.bias.to(dtype))
            scores_TE = logits_TE if bias_E is None else logits_TE + bias_E
            selected_TE, experts_TK = select_top_k(scores_TE, self.options.top_k, batch.padding_T, replay_TE)
            weights_TE = softmax_over(logits_TE, selected_TE)
            routing = Routing(
                logits_TE=logits_TE,
                probs_TE=probs_TE,
                weights_TE=weights_TE,
                selected_TE=selected_TE,
                kept_TE=selected_TE,
                expert_input_shift_TH=shift_TH,
                experts_TK=experts_TK,
            )
            self._regularise(routing, latents, prototypes.mean_ND, batch)
        return routing

    def _encode(self, x_TH: Tensor) -> Gaussians:
        """mu and logvar, each [T, D]."""
        dtype = x_TH.dtype
        norm, encoder = self.norm, self.encoder
        a_TH = F.silu(F.layer_norm(x_TH, (self.hidden_size,), norm.weight.to(dtype), norm.bias.to(dtype), norm.eps))
        mu_TD, logvar_TD = F.linear(a_TH, encoder.weight.to(dtype), encoder.bias.to(dtype)).chunk(2, dim=-1)
        return Gaussians(mu_TD, logvar_TD)

    def _regularise(self, routing: Routing, latents: Gaussians, prototypes_ED: Tensor, batch: TokenBatch) -> None:
        """Adds the losses whose coefficient is not always 0, without their coefficients, and the sums for the state."""
        options, sets, layer = self.options, TokenSets(batch, self.options.scope), self.layer
        mu_TD, logvar_TD = latents.mean_ND, latents.logvar_ND
        assert logvar_TD is not None
        shares_TE, samples_TD = routing.weights_TE, mu_TD
        if options.mode == "published":
            shares_TE = published_shares(routing.logits_TE, routing.selected_TE)
            noise_TD = batch.noise("lpr", layer, (options.latent_dim,)).to(mu_TD.dtype)
            samples_TD = mu_TD + torch.exp(0.5 * logvar_TD) * noise_TD
        losses: dict[str, LossTerm] = {}
        learned = options.prototypes == "learned"
        if (c := self._coefficient("diversity_weight", batch)) is not None:
            losses["lpr_diversity"] = latent_diversity(options.diversity, mu_TD, sets, layer, c)
            if learned:
                losses["lpr_prototype_diversity"] = prototype_diversity(options.diversity, prototypes_ED, sets, c)
        if (c := self._coefficient("kl_weight", batch)) is not None:
            losses["lpr_kl"] = kl_to_standard_normal(mu_TD, logvar_TD, sets, c)
        if learned and (c := self._coefficient("align_weight", batch)) is not None:
            losses["lpr_alignment"] = prototype_alignment(
                prototypes_ED, shares_TE, samples_TD, sets, layer, c, averaged=options.mode == "paper"
            )
        routing.losses = losses
        if options.prototypes == "ema":
            squares_TD = None if self.prototype_logvar is None else mu_TD.square() + logvar_TD.exp()
            routing.sums = ema_sums(shares_TE, samples_TD, squares_TD, batch.padding_T)

    def _coefficient(self, weight: str, batch: TokenBatch) -> float | None:
        """Of a loss in this step; None where it is 0 in every step."""
        options, value = self.options, getattr(self.options, weight)
        if 0 in (options.reg_scale, bounds(options.coefficient)[1], bounds(value)[1]):
            return None
        return options.reg_scale * value_at(options.coefficient, batch.step) * value_at(value, batch.step)

    def products_per_token(self) -> int:
        # Prototypes are met in the scores and again in the mixture, and need not be parameters.
        options = self.options
        count = similarity_products(options.similarity, options.latent_dim, self.num_experts)
        count += self.encoder.weight.numel()
        if self.decoder is not None:
            count += self.prototypes.numel() + self.decoder.weight.numel()
        return count

    def after_step(self, sums: dict[str, Tensor]) -> None:
        if self.options.prototypes == "ema":
            move_prototypes(self.prototypes, self.prototype_mass, self.prototype_logvar, sums, self.options.ema_decay)

    def _placed(self, prototypes_ED: Tensor) -> Tensor:
        if self.options.prototype_init == "hypersphere":
            return F.normalize(prototypes_ED, dim=-1)
        return prototypes_ED

    def initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        if name == "prototypes":
            return self._placed(torch.randn(shape, generator=generator))
        if name in ("prototype_logvar", "similarity.log_sigma"):
            return torch.zeros(shape)
        return None

    def no_decay_parameters(self) -> set[str]:
        return {"prototypes", "prototype_logvar"} & dict(self.named_parameters()).keys()
