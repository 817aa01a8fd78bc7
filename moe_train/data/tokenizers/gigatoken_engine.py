"""The fast engine: gigatoken, in place of a tokenizer's own engine where it has proved itself equal.

A reimplementation may differ from the original in rare cases, which would train a model on other tokens than it is used
with. So it is asked to encode a sample of the run's own text first, and takes over only if every id is the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_train.data.tokenizers.hugging_face import HuggingFaceTokenizer
from moe_train.data.tokenizers.interface import IdArray, LengthArray, Tokenizer
from moe_train.data.tokenizers.sentencepiece_model import SentencePieceTokenizer
from moe_train.data.tokenizers.tiktoken_file import TiktokenTokenizer

Say = Callable[[str], None]


class GigatokenTokenizer(Tokenizer):
    """A tokenizer with gigatoken's engine. Texts that spell a special token, or hold what else the original treats in a
    way of its own, go to the original."""

    def __init__(self, original: Tokenizer, engine: Any) -> None:
        self.original, self._engine = original, engine
        self.path, self.checksum, self.eod_id = original.path, original.checksum, original.eod_id
        self.special_tokens, self.bytes_V = original.special_tokens, original.bytes_V
        self._careful = "|".join(re.escape(spelling) for spelling in _special_spellings(original))
        self._special_from = self._lowest_telling_id()

    def encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        import pyarrow as pa

        ids, lengths_D = self.encode_column(pa.array(texts, pa.large_string()))
        return [part.astype(np.int32) for part in np.split(ids, np.cumsum(lengths_D)[:-1])] if texts else []

    def encode_column(self, texts_D: Any) -> tuple[npt.NDArray[Any], LengthArray]:
        import pyarrow.compute as pc

        result = self._engine.encode_batch(_as_awkward(texts_D), parallel=False).layout.to_ListOffsetArray64()
        offsets = result.offsets.data
        ids, lengths_D = result.content.data[offsets[0] : offsets[-1]], np.diff(offsets)
        highest = int(ids.max(initial=0))
        assert highest < self.vocab_size, "a token outside the vocabulary"
        if highest < self._special_from:
            return ids, lengths_D
        careful = pc.match_substring_regex(texts_D, self._careful)
        if careful.true_count == 0:
            return ids, lengths_D
        parts = np.split(ids, np.cumsum(lengths_D)[:-1])
        again = self.original.encode_batch(texts_D.filter(careful).to_pylist())
        for row, part in zip(np.flatnonzero(careful.to_numpy(zero_copy_only=False)), again, strict=True):
            parts[row], lengths_D[row] = part.astype(ids.dtype), len(part)
        return np.concatenate(parts), lengths_D

    def _lowest_telling_id(self) -> int:
        """A text without an id from this one on spells no special token, as the engine gives that its own id; a look at
        the ids costs less than a search in the text. 0 where the engine does not."""
        spellings = _special_spellings(self.original)
        lowest = min(self.special_tokens.values(), default=0)
        texts = [text for s in spellings for text in (s, f"a{s}b", f" {s} ", f"\n{s}\n", f"{s}{s}")]
        found = [ids.max(initial=0) for ids in map(np.asarray, self._engine.encode_batch(texts, parallel=False))]
        return lowest if all(highest >= lowest for highest in found) else 0


def fast_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with gigatoken's engine, for a process whose parent has seen it prove itself."""
    return GigatokenTokenizer(tokenizer, _engine(tokenizer))


def with_fast_engine(tokenizer: Tokenizer, sample: Sequence[str], say: Say) -> Tokenizer:
    """The tokenizer with gigatoken's engine if that is installed, takes the model, and encodes the sample alike; else
    the tokenizer itself, and ``say`` is told why."""
    try:
        fast = GigatokenTokenizer(tokenizer, _engine(tokenizer))
    except ImportError:
        say("gigatoken is not installed (pip install 'moe-train[data]'): encoding with the far slower reference engine")
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic inside the library is no Exception
        say(f"gigatoken does not take {tokenizer.path} ({error}): encoding with the reference engine")
        return tokenizer
    if not any(sample):
        say("there is no text to try gigatoken on: encoding with the reference engine")
        return tokenizer
    try:
        found = fast.encode_batch(sample)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        say(f"WARNING: gigatoken fails on a document of this data ({error}): encoding with the reference engine")
        return tokenizer
    for text, got, want in zip(sample, found, tokenizer.encode_batch(sample), strict=True):
        if not np.array_equal(got, want):
            say(
                f"WARNING: gigatoken encodes a document of this data differently from the reference ({len(got)} and "
                f"{len(want)} tokens, beginning {text[:60]!r}): encoding with the reference engine, far slower"
            )
            return tokenizer
    return fast


def _engine(tokenizer: Tokenizer) -> Any:
    import gigatoken

    if isinstance(tokenizer, TiktokenTokenizer):
        return gigatoken.Tokenizer.from_tiktoken(tokenizer.path, tokenizer.encoding.scheme, {})
    if isinstance(tokenizer, SentencePieceTokenizer):
        return gigatoken.Tokenizer.from_sentencepiece(tokenizer.path)
    assert isinstance(tokenizer, HuggingFaceTokenizer), type(tokenizer)
    return gigatoken.Tokenizer(str(tokenizer.path))


def _as_awkward(texts: Any) -> Any:
    """A pyarrow large_string array without nulls as gigatoken takes it, without a copy of the text."""
    import awkward as ak
    import pyarrow as pa

    if texts.offset:
        texts = pa.concat_arrays([texts, texts[:0]])  # copies: the buffers then hold these texts only
    _, offsets, content = texts.buffers()
    index = np.frombuffer(offsets, np.int64)[: len(texts) + 1] if len(texts) else np.zeros(1, np.int64)
    # No letter at all has no buffer.
    letters = np.frombuffer(content, np.uint8) if content is not None else np.zeros(0, np.uint8)
    characters = ak.contents.NumpyArray(letters, parameters={"__array__": "char"})
    layout = ak.contents.ListOffsetArray(ak.index.Index64(index), characters, parameters={"__array__": "string"})
    return ak.Array(layout)


def _special_spellings(tokenizer: Tokenizer) -> list[str]:
    extra = ["\u2581"] if isinstance(tokenizer, SentencePieceTokenizer) else []
    return [*tokenizer.special_tokens, *extra]
