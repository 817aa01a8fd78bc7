"""Which tokenizer a path holds."""

from __future__ import annotations

from pathlib import Path

from moe_train.data.tokenizers.hugging_face import FILE, HuggingFaceTokenizer
from moe_train.data.tokenizers.interface import Tokenizer, check_unicode
from moe_train.data.tokenizers.sentencepiece_model import SentencePieceTokenizer
from moe_train.data.tokenizers.tiktoken_file import TiktokenTokenizer, is_rank_file


def load_tokenizer(path: str | Path, eod_token: str | None = None) -> Tokenizer:
    """The tokenizer that a path holds: a sentencepiece `.model`, a Hugging Face `tokenizer.json` or a folder with one
    (with `tokenizer.model` where there is no other), or a tiktoken rank file.

    ``eod_token``: the special token that ends documents, where the tokenizer does not say or another one is wanted.
    Errors: FileNotFoundError; ImportError that names the extra; ValueError where nothing reads such a path.
    """
    path = Path(path)
    if eod_token is not None:
        check_unicode(eod_token, "the token that ends documents")
    if path.is_dir():
        found = [path / name for name in (FILE, "tokenizer.model") if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} holds neither {FILE} nor tokenizer.model")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {path} does not exist")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eod_token)
    if path.suffix == ".tiktoken" or (path.suffix == ".model" and is_rank_file(path)):
        return TiktokenTokenizer(path, eod_token)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, eod_token)
    raise ValueError(
        f"{path} is no known kind of tokenizer; known are sentencepiece models (.model), Hugging Face tokenizer.json "
        "and tiktoken rank files (.tiktoken)"
    )
