"""Continue prompts with a trained or an imported model."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

WORKER = "moe_train.training.generate"
_EXAMPLE = """examples:
  moe-train generate runs/demo --prompt 'def main('
  moe-train generate runs/demo --prompt 'Once' --temperature 0.8 --top-p 0.95 --seed 3 --stop '.'
  cat text.txt | moe-train generate runs/demo --prompt -
  moe-train generate runs/demo/checkpoints/step_00000200 --prompts prompts.jsonl --json --processes 2"""


def register(parser: argparse.ArgumentParser) -> None:
    from moe_train.commands.evaluate import positive

    parser.epilog = _EXAMPLE
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="run folder (its latest checkpoint), or a checkpoint in one"
    )
    what = parser.add_argument_group("prompts")
    what.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue, or - for standard input"
    )
    what.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='more of them: one per line, or JSONL (.jsonl) with the key "prompt"; blank lines are left out',
    )
    how = parser.add_argument_group("sampling (temperature, then top-k, then top-p)")
    how.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="per prompt (default: 128)")
    how.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the most probable token (default: 0)"
    )
    how.add_argument("--top-k", type=positive, metavar="K", help="draw among the K most probable tokens")
    how.add_argument("--top-p", type=float, metavar="P", help="draw among the most probable that sum up to P")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers (default: 0)")
    how.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="tokenizer file or folder (default: the run's own)"
    )
    parser.add_argument(
        "--processes",
        type=positive,
        default=1,
        metavar="N",
        help="processes that share experts and prompts (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt, and nothing else")


def run(arguments: argparse.Namespace) -> int:
    from moe_train.commands.stopping import Terminated, can_be_stopped
    from moe_train.evaluation.generation.length_warning import plain_warnings

    prompts = read_prompts(arguments.prompt, arguments.prompts)
    options = generation_options(arguments)
    stream = len(prompts) == 1 and not arguments.json
    with can_be_stopped(""), plain_warnings():
        if arguments.processes == 1:
            code, completions = 0, _in_process(arguments, prompts, options, stream)
        else:
            code, completions = _in_workers(arguments, prompts, options, stream)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise KeyboardInterrupt if code == 128 + signal.SIGINT else Terminated
    if code:
        print("the generation did not finish; see above", file=sys.stderr)
        return code
    if not stream:
        show(prompts, completions, as_json=arguments.json)
    return 0


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """Prompts of the command line, then those of the file. ValueError where there is none, or one cannot be read or is
    not valid Unicode; FileNotFoundError."""
    if given.count("-") > 1:
        raise ValueError("--prompt - reads standard input to its end: give it once")
    prompts = [_given(text) for text in given] + ([] if file is None else _of_file(file))
    if not prompts:
        raise ValueError("give a text to continue: --prompt TEXT, --prompt - for standard input, or --prompts FILE")
    return prompts


def _given(text: str) -> str:
    from moe_train.data.tokenizers import check_unicode

    where = "the text of standard input" if text == "-" else "the text of --prompt"
    try:
        text = sys.stdin.read() if text == "-" else text
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: {error}") from None
    check_unicode(text, where)
    return text


def _of_file(file: Path) -> list[str]:
    if file.is_dir():
        raise ValueError(f"{file} is a folder, not a file of prompts")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # some editors put a byte order mark in front
    except FileNotFoundError:
        raise FileNotFoundError(f"the file of prompts {file} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"{file} holds no prompt")
    of_json = file.suffix == ".jsonl"
    return [_of_json(line, f"{file}, line {number}") if of_json else line for number, line in numbered]


def _of_json(line: str, where: str) -> str:
    from moe_train.data.tokenizers import check_unicode

    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise ValueError(f'{where} is no object with a text under "prompt"')
    check_unicode(value["prompt"], where)
    return str(value["prompt"])


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of GenerationOptions, checked. ValueError with the option's name as on the command line."""
    from moe_train.data.tokenizers import check_unicode
    from moe_train.evaluation.generation.options import GenerationOptions

    for text in arguments.stop:
        check_unicode(text, "the text of --stop")
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    options = {name: getattr(arguments, name) for name in names}
    GenerationOptions(**options | {"stop": tuple(arguments.stop)})
    return options


def _in_process(
    arguments: argparse.Namespace, prompts: list[str], options: dict[str, Any], stream: bool
) -> list[dict[str, Any]]:
    from moe_train.api import load

    model = load(arguments.checkpoint, tokenizer=arguments.tokenizer)
    if not stream:
        return [completion.to_json() for completion in model.generate(prompts, **options)]
    pieces = model.stream(prompts[0], **options)
    try:
        for text in pieces:
            print(text, end="", flush=True)
    finally:
        print(flush=True)
    return []


def _in_workers(
    arguments: argparse.Namespace, prompts: list[str], options: dict[str, Any], stream: bool
) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and completions of a launch; with ``stream`` its rank 0, which has the one prompt, prints."""
    from moe_train.commands.evaluate import launch
    from moe_train.data.tokenizers import load_tokenizer
    from moe_train.training.loading import run_and_checkpoint

    run_dir, checkpoint = run_and_checkpoint(arguments.checkpoint)
    tokenizer = None
    if arguments.tokenizer is not None:
        load_tokenizer(arguments.tokenizer)  # here too, so that what is wrong with it is said once
        tokenizer = str(arguments.tokenizer)
    with tempfile.TemporaryDirectory(prefix="moe-train-") as folder:
        request, output = Path(folder, "request.json"), Path(folder, "completions.json")
        content = {"prompts": prompts, "options": options, "tokenizer": tokenizer, "stream": stream}
        request.write_text(json.dumps(content), encoding="utf-8")
        line = ["--run-dir", str(run_dir), "--checkpoint", str(checkpoint), "--request", str(request)]
        code = launch(WORKER, [*line, "--output", str(output)], run_dir, arguments.processes)
        if code == 0 and not output.is_file():
            print(f"the workers ended without writing {output}", file=sys.stderr)
            code = 1
        return code, [] if code else json.loads(output.read_text(encoding="utf-8"))


def show(prompts: list[str], completions: list[dict[str, Any]], as_json: bool) -> None:
    """Prints one JSON object per prompt, or prompts and texts for people."""
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), start=1):
        if as_json:
            print(json.dumps({"prompt": prompt, **completion}, ensure_ascii=False))
        else:
            print(f"--- {number}: {prompt}\n{completion['text']}")
