"""The ways to get from parquet to .bin that are compared; each runs in a process of its own.

Prints one JSON object: CPU seconds of start-up (imports, tokenizer, self-check) and of the work, bytes of text, peak
memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Encode = Callable[[Any], tuple[np.ndarray, np.ndarray]]
"""An arrow array of texts -> ids of all of them, and the number of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=list(ARMS))
    parser.add_argument("sources", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-bytes", type=int, help="read about so much text only")
    arguments = parser.parse_args()
    work = ARMS[arguments.arm](arguments)
    # What the arm before left there is not for this one to remove.
    shutil.rmtree(arguments.output, ignore_errors=True)
    start_up = time.process_time()
    wall = time.perf_counter()
    text_bytes, tokens = work()
    facts = {
        "start_up_cpu_s": start_up,
        "cpu_s": time.process_time() - start_up,
        "wall_s": time.perf_counter() - wall,
        "text_bytes": text_bytes,
        "tokens": tokens,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(facts))


def ours(arguments: argparse.Namespace, everything: bool) -> Callable[[], tuple[int, int]]:
    from moe_train.data.prepare import PrepareOptions, prepare
    from moe_train.data.sources import find_sources, first_texts
    from moe_train.data.tokenizers import load_tokenizer
    from moe_train.data.tokenizers.gigatoken_engine import with_fast_engine

    files = find_sources([arguments.sources])
    reference = load_tokenizer(arguments.tokenizer, "<|endoftext|>")
    tokenizer = with_fast_engine(reference, first_texts(files, ["text"], 200), print)
    assert tokenizer is not reference, "gigatoken does not encode"
    on = dict(min_language_score=0.65, dumps=("CC-MAIN-2024-10",), url_exclude="/login/", min_chars=20, max_chars=10**6)
    on |= dict(sample=1 - 1e-12, validation_fraction=0.01, test_fraction=0.01, shard_tokens=50_000_000, on_bad="skip")
    on |= dict(max_documents=10**9)
    options = PrepareOptions(**on if everything else {})

    def work() -> tuple[int, int]:
        manifests = prepare(files, arguments.output / "x", tokenizer, options)
        return tuple(sum(m[key] for m in manifests.values()) for key in ("text_bytes", "tokens"))

    return work


def plain(arguments: argparse.Namespace, load: Callable[[Path], Encode]) -> Callable[[], tuple[int, int]]:
    """pyarrow -> engine -> .bin and .idx, row group by row group, and nothing else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from moe_train.data.index_file import write_index

    encode = load(arguments.tokenizer)
    eod = 50256

    def columns() -> Iterator[Any]:
        for path in sorted(arguments.sources.glob("*.parquet")):
            with pq.ParquetFile(path) as parquet:
                for group in range(parquet.num_row_groups):
                    table = parquet.read_row_group(group, columns=["text"], use_threads=False)
                    yield table.column(0).combine_chunks().cast(pa.large_string())

    def work() -> tuple[int, int]:
        arguments.output.mkdir(parents=True)
        text_bytes, lengths = 0, []
        with open(arguments.output / "x.bin", "wb", buffering=0) as stream:
            for texts in columns():
                text_bytes += texts.nbytes - 8 * (len(texts) + 1)
                ids, counts = encode(texts)
                stream.write(np.insert(ids.astype(np.uint16), np.cumsum(counts), eod).data)
                lengths.append(counts + 1)
                if arguments.max_bytes and text_bytes > arguments.max_bytes:
                    break
        everything = np.concatenate(lengths)
        write_index(arguments.output / "x.idx", np.dtype(np.uint16), len(everything), [everything])
        return text_bytes, int(everything.sum())

    return work


def gigatoken(path: Path) -> Encode:
    import awkward as ak
    import gigatoken

    engine = gigatoken.Tokenizer(str(path))

    def encode(texts: Any) -> tuple[np.ndarray, np.ndarray]:
        offsets = np.frombuffer(texts.buffers()[1], np.int64)[: len(texts) + 1]
        letters = ak.contents.NumpyArray(np.frombuffer(texts.buffers()[2], np.uint8), parameters={"__array__": "char"})
        strings = ak.contents.ListOffsetArray(ak.index.Index64(offsets), letters, parameters={"__array__": "string"})
        result = engine.encode_batch(ak.Array(strings), parallel=False)
        return np.asarray(ak.flatten(result, axis=1)), np.asarray(ak.num(result, axis=1))

    return encode


def joined(encode: Callable[[list[str]], list[list[int]]]) -> Encode:
    def joined_encode(texts: Any) -> tuple[np.ndarray, np.ndarray]:
        encoded = encode(texts.to_pylist())
        return np.concatenate([np.array(ids, np.int32) for ids in encoded]), np.array([len(ids) for ids in encoded])

    return joined_encode


def tokenizers(path: Path) -> Encode:
    import tokenizers

    engine = tokenizers.Tokenizer.from_file(str(path))
    return joined(lambda texts: [e.ids for e in engine.encode_batch_fast(texts, add_special_tokens=False)])


def tiktoken(path: Path) -> Encode:
    import tiktoken

    from moe_train.data.tokenizers import load_tokenizer
    from moe_train.data.tokenizers.hugging_face import HuggingFaceTokenizer

    reference = load_tokenizer(path, "<|endoftext|>")
    assert isinstance(reference, HuggingFaceTokenizer)
    ranks = {content: token for token, content in enumerate(reference.bytes_V) if content}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    engine = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    return joined(lambda texts: engine.encode_ordinary_batch(texts, num_threads=1))


ARMS: dict[str, Callable[[argparse.Namespace], Callable[[], tuple[int, int]]]] = {
    "everything": lambda arguments: ours(arguments, everything=True),
    "defaults": lambda arguments: ours(arguments, everything=False),
    "ceiling": lambda arguments: plain(arguments, gigatoken),
    "tiktoken": lambda arguments: plain(arguments, tiktoken),
    "tokenizers": lambda arguments: plain(arguments, tokenizers),
}

if __name__ == "__main__":
    main()
