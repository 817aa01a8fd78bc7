"""``python -m moe_train.training.evaluate``: one worker that evaluates a checkpoint of a run, as launchers start it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_train.training.loading import load_model, own_checkpoint, with_layout_for
from moe_train.training.worker import exit_now, run_to_end
from moe_train.training.worker_status import StatusFile


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_train.training.evaluate", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--data", metavar="NAME", help="default: the run's validation data")
    parser.add_argument("--checkpoint", default="latest", metavar="latest|STEP|PATH")
    parser.add_argument("--limit-batches", type=int, metavar="N")
    parser.add_argument("--documents", action="store_true", help="documents one by one, in place of windows")
    parser.add_argument("--max-length", type=int, metavar="N")
    parser.add_argument("--batch-documents", type=int, metavar="N")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="parquet file with the experts of every token")
    parser.add_argument("--against", metavar="latest|STEP|PATH", help="compare the routing with this checkpoint's")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, written by rank 0")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by launchers, as in the environment")
    parser.add_argument("--status", default="", help="name of the launch, for the file that says how it ended")
    arguments = parser.parse_args(argv)
    status = StatusFile(arguments.run_dir, arguments.status, int(os.environ.get("RANK", "0")))
    return run_to_end(lambda _: evaluate_run(arguments), status)


def evaluate_run(arguments: argparse.Namespace) -> bool:
    """Loads the weights into a plain model, without an engine, and evaluates under this process's layout."""
    from moe_train.data.dataset import open_dataset
    from moe_train.data.options import label_of
    from moe_train.data.unigram import unigram_entropy
    from moe_train.evaluation.result import write_evaluation
    from moe_train.parallel.groups import initialize
    from moe_train.training.document_validation import DocumentProtocol, validate_documents
    from moe_train.training.evaluation_watchers import Watchers
    from moe_train.training.run_folder import index_folder, load
    from moe_train.training.validation import ValidationSet

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = with_layout_for(load(arguments.run_dir), world_size)
    directory = own_checkpoint(arguments.run_dir, arguments.checkpoint)
    groups = initialize(config.parallel)
    weights = load_model(config, groups, directory)
    model, state = weights.model, weights.state
    data = arguments.data or config.data.validation
    more: dict[str, Any] = {}
    watchers = Watchers(config, groups, arguments.run_dir, trace=arguments.trace, against=arguments.against)
    if arguments.documents:
        given = {"max_length": arguments.max_length, "batch_documents": arguments.batch_documents}
        protocol = DocumentProtocol(max_batches=arguments.limit_batches, **{k: v for k, v in given.items() if v})
        result, more["documents"] = validate_documents(model, config, groups, data, protocol, watchers.start)
    else:
        cache = index_folder(config, arguments.run_dir)
        limit = arguments.limit_batches
        validation = ValidationSet(config, groups, data, cache=cache, max_batches=limit, with_domains=True)
        result = validation.evaluate(model, watchers.start(validation.names, validation.members, validation.labels))
    result, found = watchers.finish(result)
    more |= found
    if groups.rank == 0:
        entropy = None
        if isinstance(data, str):
            entropy, more["unigram_sample"] = unigram_entropy(open_dataset(data))
        write_evaluation(
            arguments.output, result.to_json(step=state["step"], data=label_of(data), unigram_entropy=entropy) | more
        )
    return True


if __name__ == "__main__":
    exit_now(main())
