"""Values of a config.json by their types; one of another type is an error that names key and value."""

from __future__ import annotations

from typing import Any

from moe_train.interop.keys import CLASSES, DEFAULTS, ONLY, WITHOUT_EFFECT
from moe_train.interop.rope import ROPE_KEYS
from moe_train.interop.typed import mapping, number, sequence, whole


class ConfigValues:
    """The file's values, noting which were asked for.

    A key that is missing has the value that transformers takes for it; one that is null is None. All methods but
    ``get`` raise ValueError for a value of another type.
    """

    def __init__(self, content: dict[str, Any], family: str) -> None:
        self.content, self.family = content, family
        self.seen = set(WITHOUT_EFFECT) | set(ROPE_KEYS)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        value = self.content.get(key)
        return DEFAULTS[self.family].get(key, default) if value is None and key not in self.content else value

    def whole(self, key: str) -> int:
        return whole(key, self.get(key))

    def whole_or_none(self, key: str) -> int | None:
        return None if self.get(key) is None else self.whole(key)

    def count(self, key: str) -> int:
        """None counts as 0."""
        return 0 if self.get(key) is None else whole(key, self.get(key), least=0)

    def number(self, key: str) -> float:
        return number(key, self.get(key))

    def number_or_none(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """None counts as False, as for transformers."""
        value = self.get(key)
        if value is not None and not isinstance(value, (bool, int)):
            raise ValueError(f"config.json: {key} is {value!r}; true or false is needed")
        return bool(value)

    def sequence(self, key: str) -> list[Any]:
        """None counts as the empty list."""
        return [] if self.get(key) is None else sequence(key, self.get(key))

    def check_rest(self) -> None:
        """Errors: ValueError where a key that was not asked for would change what the model computes."""
        own = CLASSES[self.family].removesuffix("ForCausalLM")
        for part, name in mapping("auto_map", self.get("auto_map")).items():
            # Some carry the code that they had before transformers had it; code under other names is another model.
            if not str(name).rpartition(".")[2].startswith(own):
                raise ValueError(f"config.json: auto_map.{part} is {name!r}: a model with code of its own")
        for key, values in ONLY.items():
            self.seen.add(key)
            if key in self.content and self.content[key] not in values:
                raise ValueError(f"config.json: {key} is {self.content[key]!r}, which our {self.family} cannot do")
        unknown = sorted(self.content.keys() - self.seen)
        if unknown:
            raise ValueError(
                f"config.json: {unknown[0]} is {self.content[unknown[0]]!r}, a key that is not known for "
                f"{self.content['model_type']}: it may change what the model computes. Where it does not, take it out"
            )
