"""``python -m moe_train.training.generate``: one worker that generates text with others, as launchers start it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from moe_train.evaluation.generation.length_warning import plain_warnings
from moe_train.training.worker import exit_now, run_to_end
from moe_train.training.worker_status import StatusFile


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_train.training.generate", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--request", type=Path, required=True, help="JSON file: prompts, options, tokenizer, stream")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, written by rank 0")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by launchers, as in the environment")
    parser.add_argument("--status", default="", help="name of the launch, for the file that says how it ended")
    arguments = parser.parse_args(argv)
    status = StatusFile(arguments.run_dir, arguments.status, int(os.environ.get("RANK", "0")))
    with plain_warnings():
        return run_to_end(lambda _: generate_run(arguments), status)


def generate_run(arguments: argparse.Namespace) -> bool:
    """Loads the weights under this process's layout and completes this rank's share of the prompts."""
    from moe_train.data.files import write_atomically
    from moe_train.evaluation.generation.completion import complete
    from moe_train.evaluation.generation.loop import Step, TextGenerator
    from moe_train.evaluation.generation.options import GenerationOptions
    from moe_train.evaluation.generation.text import Vocabulary
    from moe_train.parallel.groups import initialize
    from moe_train.training.loading import load_model, with_layout_for
    from moe_train.training.run_folder import load
    from moe_train.training.run_tokenizer import encode_prompts, end_ids, run_tokenizer

    request = json.loads(arguments.request.read_text(encoding="utf-8"))
    options = GenerationOptions(**request["options"] | {"stop": tuple(request["options"].get("stop", ()))})
    config = with_layout_for(load(arguments.run_dir), int(os.environ.get("WORLD_SIZE", "1")))
    path = request["tokenizer"]
    tokenizer = run_tokenizer(arguments.run_dir, config, None if path is None else Path(path))
    groups = initialize(config.parallel)
    weights = load_model(config, groups, arguments.checkpoint)
    vocabulary = Vocabulary(tokenizer.bytes_V, end_ids(tokenizer, arguments.run_dir))
    generator = TextGenerator(weights.model, groups, vocabulary, config.data.sequence_length)

    def show(step: Step) -> None:
        print(step.text, end="" if step.finish is None else "\n", flush=True)

    prompts = encode_prompts(tokenizer, arguments.run_dir, request["prompts"])
    completions = complete(generator, prompts, options, show if request["stream"] else None)
    if groups.rank == 0:
        text = json.dumps([completion.to_json() for completion in completions])
        write_atomically(arguments.output, text.encode())
    return True


if __name__ == "__main__":
    exit_now(main())
