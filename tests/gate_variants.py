"""Option sets of gates that are worth testing besides the defaults; each fits 8 experts."""

from __future__ import annotations

from typing import Any

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "dynamic_k": [
        {"max_k": 3},
        {"threshold": 0.4, "min_k": 2},
        {"mode": "published", "max_k": 6},
        {"threshold": {"start": 0.9, "end": 0.3, "steps": 3}},
    ],
    "lpr": [
        {"scope": "micro_batch", "prototype_init": "hypersphere"},
        {"scope": "global_batch", "top_k": 3, "latent_dim": 4},
        {"similarity": "cross_attention", "diversity": "cosine", "scope": "global_batch"},
        {"similarity": "gaussian", "sigma": 2.0, "diversity": "euclidean", "input_shift": False},
        {"similarity": "mahalanobis", "diversity": "cosine", "coefficient": {"start": 0.1, "end": 0.01, "steps": 2}},
        {"similarity": "dot", "mode": "published", "reg_scale": 18.0, "scope": "micro_batch"},
        {"similarity": "kl", "diversity": "euclidean", "scope": "micro_batch"},
        {"similarity": "js", "prototypes": "ema", "latent_dim": 4},
        {"similarity": "hellinger", "latent_dim": 4},
        {"similarity": "wasserstein", "diversity": "cosine"},
        {"prototypes": "frozen"},
        {"prototypes": "ema", "ema_decay": 0.5, "mode": "published"},
    ],
    "sigmoid_topk": [
        {"top_k": 3, "renormalize": False},
        {"top_k": 3, "num_groups": 4, "groups_per_token": 2, "scaling": 2.5},
        {"num_groups": 8, "groups_per_token": 3},
    ],
    "softmax_topk": [{"top_k": 3, "renormalize": False}, {"top_k": 2, "softmax": "after"}],
}
