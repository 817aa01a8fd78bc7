"""Models of Hugging Face's hub to run folders of ours, and back."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_EXAMPLE = """examples:
  moe-train convert import Qwen3-30B-A3B models/qwen3
  moe-train train my.yaml --init-from models/qwen3
  moe-train convert export runs/demo exported/demo --dtype bfloat16"""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def register(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLE
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    how = argparse.RawDescriptionHelpFormatter

    imports = actions.add_parser(
        "import",
        help="a model folder of the hub to a run folder",
        description="Writes OUT, a run folder with a checkpoint of weights at step 0, tokenizer and configuration.\n"
        "Families: mixtral, qwen3_moe, olmoe, deepseek_v3, qwen3, llama. Nothing of the model is left out silently.",
        formatter_class=how,
    )
    imports.add_argument("source", type=Path, metavar="HF_DIR", help="folder with config.json and *.safetensors")
    imports.add_argument("out", type=Path, metavar="OUT", help="folder to write; appears when it is complete")
    imports.add_argument(
        "--drop-mtp",
        action="store_true",
        help="leave out DeepSeek's layer of multi-token prediction (default: keep it)",
    )
    imports.add_argument("--force", action="store_true", help="replace OUT where it is an imported model")

    exports = actions.add_parser(
        "export",
        help="a run or checkpoint to a model folder that transformers loads",
        description="Writes HF_DIR: config.json, safetensors files and the tokenizer, from a checkpoint of any layout.",
        formatter_class=how,
    )
    exports.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="run folder, or a checkpoint in it")
    exports.add_argument("out", type=Path, metavar="HF_DIR", help="folder to write; appears when it is complete")
    exports.add_argument("--step", type=int, metavar="N", help="of a run folder: this checkpoint (default: the latest)")
    exports.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the weights; auto: as they came for an imported model, else what the run computed in",
    )
    exports.add_argument(
        "--max-shard-size", type=size, default=size("5GB"), metavar="SIZE", help="of one file, such as 500MB (5GB)"
    )
    exports.add_argument(
        "--form",
        choices=("auto", "stock", "custom"),
        default="auto",
        help="stock: a class of transformers; custom: a modelling file of its own, which loads with "
        "trust_remote_code=True; auto: stock where such a class computes the same",
    )
    exports.add_argument("--force", action="store_true", help="replace HF_DIR where it is an exported model")


def run(args: argparse.Namespace) -> int:
    from moe_train.commands.stopping import can_be_stopped
    from moe_train.training.convert import export_model, import_model

    try:
        with can_be_stopped(f"; {args.out} is as it was"):
            if args.action == "import":
                report = import_model(args.source, args.out, force=args.force, drop_multi_token=args.drop_mtp)
            else:
                report = export_model(
                    args.checkpoint,
                    args.out,
                    step=args.step,
                    dtype=args.dtype,
                    form=args.form,
                    shard_bytes=args.max_shard_size,
                    force=args.force,
                )
    except OSError as error:
        raise OSError(f"{args.out} was not written: {error}") from error
    for note in report.notes:
        print(f"note: {note}")
    print(report.summary)
    return 0


def size(text: str) -> int:
    """Bytes of a text such as 500MB or 5GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", text.strip().upper())
    if match is None or (unit := match[2] or "") not in _UNITS or not (value := int(float(match[1]) * _UNITS[unit])):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 500MB or 5GB")
    return value
