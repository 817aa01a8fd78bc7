"""Models of Hugging Face's hub to run folders of ours, and back; dense models to models with experts."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_train.training.convert import Report

_EXAMPLE = """examples:
  moe-train convert import Qwen3-30B-A3B models/qwen3
  moe-train train my.yaml --init-from models/qwen3
  moe-train convert export runs/demo exported/demo --dtype bfloat16
  moe-train convert upcycle models/qwen3-dense models/qwen3-moe --experts 8 --router softmax_top2"""
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
        help="of the weights; auto: as stored for an imported or upcycled model, else what the run computed in",
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

    upcycle = actions.add_parser(
        "upcycle",
        help="a run with a dense model to a run folder with experts",
        description="Writes OUT, a run folder whose model computes what the dense one computes, with experts that are\n"
        "copies or slices of its feed-forward layers. Train it with: moe-train train CONFIG --init-from OUT",
        formatter_class=how,
    )
    upcycle.add_argument(
        "checkpoint", type=Path, metavar="DENSE", help="run folder of a qwen3 or llama3, or a checkpoint"
    )
    upcycle.add_argument("out", type=Path, metavar="OUT", help="folder to write; appears when it is complete")
    upcycle.add_argument("--experts", type=int, required=True, metavar="E", help="experts per layer")
    upcycle.add_argument("--router", default="softmax_topk", metavar="NAME", help="router part (default softmax_topk)")
    upcycle.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="router.KEY=VALUE",
        help="changes to that part, such as router.options.top_k=2; may be given several times",
    )
    upcycle.add_argument(
        "--granularity", type=int, default=1, metavar="G", help="slices that each copy is cut into (default 1: whole)"
    )
    upcycle.add_argument("--shared-expert", type=int, metavar="WIDTH", help="inner units that go to a shared expert")
    upcycle.add_argument("--layers", type=numbers, metavar="0,2,…", help="layers that get experts (default all)")
    upcycle.add_argument("--noise", type=float, default=0.0, metavar="S", help="on experts, relative to their weights")
    upcycle.add_argument(
        "--gate-std", type=float, default=0.02, metavar="S", help="of the gate's weights (default 0.02)"
    )
    upcycle.add_argument("--seed", type=int, default=0, metavar="N", help="of gate and noise (default 0)")
    upcycle.add_argument("--step", type=int, metavar="N", help="of a run folder: this checkpoint (default: the latest)")
    upcycle.add_argument("--force", action="store_true", help="replace OUT where it is an upcycled model")


def run(args: argparse.Namespace) -> int:
    from moe_train.commands.stopping import can_be_stopped
    from moe_train.training.convert import export_model, import_model

    try:
        with can_be_stopped(f"; {args.out} is as it was"):
            if args.action == "import":
                report = import_model(args.source, args.out, force=args.force, drop_multi_token=args.drop_mtp)
            elif args.action == "upcycle":
                report = _upcycle(args)
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


def _upcycle(args: argparse.Namespace) -> Report:
    from moe_train.interop.upcycle import UpcycleOptions
    from moe_train.training.run_config import load_router
    from moe_train.training.upcycle import upcycle_model

    options = UpcycleOptions(
        num_experts=args.experts,
        granularity=args.granularity,
        shared_expert_hidden_size=args.shared_expert,
        layers=args.layers,
        noise=args.noise,
        gate_std=args.gate_std,
        seed=args.seed,
    )
    router = load_router(args.router, args.set)
    return upcycle_model(args.checkpoint, args.out, router, options, step=args.step, force=args.force)


def numbers(text: str) -> list[int]:
    """Of layers, such as 0,2,4."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers; write for example 0,2,4") from None


def size(text: str) -> int:
    """Bytes of a text such as 500MB or 5GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", text.strip().upper())
    if match is None or (unit := match[2] or "") not in _UNITS or not (value := int(float(match[1]) * _UNITS[unit])):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 500MB or 5GB")
    return value
