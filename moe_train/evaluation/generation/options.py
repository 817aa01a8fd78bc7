"""How text is generated."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationOptions:
    max_new_tokens: int = 128
    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most probable token (greedy)."""
    top_k: int | None = None
    """Draw among the k most probable tokens only."""
    top_p: float | None = None
    """Draw among the most probable tokens that together have at least this probability (nucleus sampling, Holtzman et
    al. 2020)."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """A sequence ends where its text would hold one of these; that text is left out."""
    batch_size: int = 8
    """Sequences that a rank reads at one time. Changes memory and speed, not what is drawn."""
    use_cache: bool = True
    """Keep keys and values; without, every step reads the whole text again: slow, for comparison."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed", "batch_size"):
            value = getattr(self, name)
            if not hasattr(value, "__index__") and not (name == "top_k" and value is None):
                raise ValueError(f"{name} is {value!r}; it must be an integer")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be a number of at least 0 (0: greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError(
                "top_k and top_p have no effect at temperature 0, which takes the most probable token: "
                "give a temperature above 0 as well"
            )
        for text in self.stop:
            if not isinstance(text, str):
                raise ValueError(f"a stop string is {text!r}; it must be text")
            if not text:
                raise ValueError("a stop string is empty")
