"""Tokenizers behind one interface, chosen by what the path holds."""

from moe_train.data.tokenizers.interface import IdArray, Tokenizer, check_unicode
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.data.tokenizers.sentencepiece_model import SentencePieceTokenizer, train_sentencepiece

__all__ = ["IdArray", "SentencePieceTokenizer", "Tokenizer", "check_unicode", "load_tokenizer", "train_sentencepiece"]
