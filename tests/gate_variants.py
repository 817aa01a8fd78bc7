"""Option sets of gates that are worth testing besides the defaults; each fits 8 experts."""

from __future__ import annotations

from typing import Any

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "base": [{"pool": "micro_batch"}],
    "dynamic_k": [
        {"max_k": 3},
        {"threshold": 0.4, "min_k": 2},
        {"mode": "published", "max_k": 6},
        {"threshold": {"start": 0.9, "end": 0.3, "steps": 3}},
    ],
    "expert_choice": [{"capacity_factor": 1.25, "pool": "micro_batch"}, {"capacity_factor": 3.0}],
    "forced_balance": [{"top_k": 1, "renormalize": False}],
    "gshard": [
        {"second": "threshold", "threshold": 0.3},
        {"second": "all"},
        {"second": "none", "threshold": 0.2},
        {"second": "none", "second_in_evaluation": "none"},
    ],
    "hash": [{"top_k": 3, "seed": 4}],
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
    "noisy_topk": [{"top_k": 3, "scope": "micro_batch"}, {"scope": "global_batch", "importance": 0.3}],
    "quantile_balancing": [
        {"top_k": 1, "weights": "sigmoid", "scope": "micro_batch"},
        {"top_k": 3, "weights": "sigmoid", "ema": 0.5},
    ],
    "relu": [
        {"scope": "global_batch", "initial_coefficient": 0.3, "mean_k": 3},
        {"balanced": False, "initial_coefficient": 0.01},
        {"scope": "micro_batch", "initial_coefficient": 0.1},
    ],
    "sigmoid_topk": [
        {"top_k": 3, "renormalize": False},
        {"top_k": 3, "num_groups": 4, "groups_per_token": 2, "scaling": 2.5},
        {"num_groups": 8, "groups_per_token": 3},
    ],
    "simbal": [{"top_k": 3, "renormalize": False}],
    "sinkhorn": [{"top_k": 2, "pool": "micro_batch"}, {"top_k": 3, "iterations": 5, "temperature": 0.5}],
    "softmax_topk": [
        {"top_k": 3, "renormalize": False},
        {"top_k": 2, "softmax": "after"},
        {"top_k": 3, "renormalize": False, "num_groups": 4, "groups_per_token": 2, "scaling": 16.0},
    ],
    "switch": [{"jitter": 0.1}],
    "uniform_random": [{"top_k": 3}],
}
