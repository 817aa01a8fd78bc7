"""Samples per second of processor time: this package's batches against megatron-core's GPTDataset.

Both read the same windows of the same files: GPTDataset's order of documents is set to that of the files, so that its
samples are the windows of the stream; each keeps its own order of samples. One pass over all windows is checked to give
the same multiset of (inputs, labels) before anything is timed. Then the arms take turns, a block of samples each.

    python benchmarks/loader.py
    python benchmarks/loader.py --data data/demo/train --sequence-length 1024 --batches 1x1 8x1 1x64
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import spread  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from moe_train.data.dataset import data_prefixes  # noqa: E402
from moe_train.data.indexed import IndexedWriter  # noqa: E402
from moe_train.data.options import DataOptions  # noqa: E402
from moe_train.data.steps import StepReader  # noqa: E402
from moe_train.data.training_set import TrainingSet, open_training_set  # noqa: E402

PEER = "megatron-core"
Read = Callable[[int, int], list[tuple[torch.Tensor, torch.Tensor]]]
"""Samples start <= index < start + count as (inputs, labels)."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="NAME", help="data set in one shard (default: random documents)")
    parser.add_argument("--tokens", type=int, default=20_000_000, metavar="N", help="of the random documents")
    parser.add_argument("--sequence-length", type=int, default=1024, metavar="S")
    parser.add_argument(
        "--batches",
        nargs="+",
        default=["1x1", "8x1", "1x8", "1x64"],
        metavar="AxB",
        help="A micro-batches of B per call",
    )
    parser.add_argument("--block", type=int, default=1024, metavar="N", help="samples of an arm's turn")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser.parse_args(argv)


def write_random(stem: Path, tokens: int) -> None:
    """Documents whose lengths spread as those of web pages do (median about 500 tokens)."""
    rng = np.random.default_rng(0)
    with IndexedWriter(f"{stem}_text_document", 32_000) as writer:
        while writer.token_count < tokens:
            length = int(np.clip(rng.lognormal(6.2, 1.0), 8, 100_000))
            writer.add(rng.integers(0, 32_000, length, dtype=np.int32))


def open_peer(prefix: str, length: int, cache: Path) -> Any:
    """GPTDataset over the documents in the order of the file."""
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=length,
        blend=([prefix], None),
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        # Its fast setting: the model is causal without a mask.
        create_attention_mask=False,
        tokenizer=SimpleNamespace(eod=-1, pad=-1, vocab_size=32_000, unique_identifiers={}),
        path_to_cache=str(cache),
    )
    low = GPTDataset.build_low_level_dataset(prefix, config)
    documents = np.arange(len(low), dtype=np.int32)
    dataset = GPTDataset(low, prefix, documents, None, Split.train, config)
    dataset.document_index = documents
    dataset.sample_index = helpers.build_sample_idx(
        low.sequence_lengths, documents, length, 1, int(low.sequence_lengths.sum()), True, True
    )
    return dataset


def peer_reader(dataset: Any) -> Read:
    def read(start: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        items = (dataset[index % len(dataset)] for index in range(start, start + count))
        return [(item["tokens"], item["labels"]) for item in items]

    return read


def our_reader(samples: TrainingSet, accumulation: int, micro_batch: int) -> Read:
    """As the trainer reads: step by step, all micro-batches of a step. Whole steps, so there may be more samples."""
    per_step = accumulation * micro_batch
    reader = StepReader(samples, batch_size=per_step, micro_size=micro_batch)

    def read(start: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        steps = range(start // per_step, -(-(start + count) // per_step))
        return [(batch.ids_BS, batch.labels_BS) for step in steps for batch in reader.batches(step)]

    return read


def windows(read: Read, count: int) -> Counter[str]:
    """The samples of one pass, as hashes."""

    def rows() -> Iterator[bytes]:
        for ids, labels in read(0, count):
            for i, label in zip(ids.view(-1, ids.shape[-1]), labels.view(-1, ids.shape[-1]), strict=True):
                yield i.numpy().tobytes() + label.numpy().tobytes()

    return Counter(hashlib.sha256(row).hexdigest() for row in islice(rows(), count))


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        name = options.data or f"{folder}/random"
        if not options.data:
            write_random(Path(name), options.tokens)
        prefixes = data_prefixes(name)
        if len(prefixes) > 1:
            raise SystemExit(f"{name} has {len(prefixes)} shards; GPTDataset reads one pair of files")
        data = DataOptions(train=name, sequence_length=options.sequence_length)
        samples = open_training_set(data, seed=0, batch_size=1, cache=Path(folder), once=lambda work: work())
        count = samples.samplers[0].samples_per_epoch
        arms = {PEER: peer_reader(open_peer(prefixes[0], options.sequence_length, Path(folder) / "cache"))}
        for shape in options.batches:
            accumulation, size = (int(part) for part in shape.split("x"))
            arms[f"moe_train, {accumulation} x {size}"] = our_reader(samples, accumulation, size)
        passes = {arm: windows(read, count) for arm, read in arms.items()}
        if any(seen != passes[PEER] for seen in passes.values()):
            raise SystemExit("the arms do not read the same windows")
        rates = measure(arms, options.rounds, options.block)
    show(rates, count, options)
    return 0


def measure(arms: dict[str, Read], rounds: int, block: int) -> dict[str, list[float]]:
    """Samples per second of processor time of each arm and round; each round begins with another arm."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(rounds + 1):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            before = time.process_time()
            arms[name](turn * block, block)
            if turn:  # the first one warms up
                rates[name].append(block / (time.process_time() - before))
    return rates


def show(rates: dict[str, list[float]], count: int, options: argparse.Namespace) -> None:
    table = Table(title=f"{count:,} windows of {options.sequence_length} tokens, {options.rounds} rounds in turn")
    for heading in ("arm", "samples per CPU second", "quartiles", f"against {PEER}"):
        table.add_column(heading)
    result: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "windows": count, "arms": {}}
    for name, values in rates.items():
        s, r = spread(values), spread([a / b for a, b in zip(values, rates[PEER], strict=True)])
        result["arms"][name] = {"samples_per_cpu_second": s, "against_peer": r}
        quartiles = f"{s['quartile_1']:,.0f} to {s['quartile_3']:,.0f}"
        table.add_row(name, f"{s['median']:,.0f}", quartiles, f"{r['median']:.1f}")
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
