"""Propose layouts for a number of GPUs: memory per rank, bytes sent, expected time of a step, best first.

Arithmetic only: no accelerator is needed, and nothing is started. A layout's keys that are given as key=value (such as
parallel.expert=8 or train.zero_stage=1) keep their value. Where the configuration's global batch is too small for the
GPUs, and none is given, the next one that they can share is planned with. Exit code 1 if no layout fits, with what
would help.
docs/parallelism.md says how figures are computed and how they compare with what was measured.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_train.launch.cost_model import Hardware

INTERMIXED = True
"""Overrides may stand between options."""
BATCH = "train.global_batch_size"


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="path of a YAML file, or name of a shipped experiment")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as train.global_batch_size=512")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="in all nodes together")
    parser.add_argument("--memory", type=float, required=True, metavar="GIB", help="of one GPU")
    parser.add_argument("--show", type=int, default=10, metavar="N", help="layouts in the table (default 10)")
    parser.add_argument("--all", action="store_true", help="every layout, and every one that was ruled out")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object, all layouts")
    machine = parser.add_argument_group(
        "the machine", "bandwidths in GB/s per GPU and direction, as programs reach them"
    )
    machine.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    machine.add_argument(
        "--reserve", type=float, default=0.1, metavar="PART", help="of a GPU's memory that is kept free (default 0.1)"
    )
    machine.add_argument("--host-memory", type=float, metavar="GIB", help="of one node (default: not looked at)")
    machine.add_argument(
        "--device", metavar="NAME", help="take the peak from the data sheet of this one, by its CUDA name"
    )
    machine.add_argument("--peak", type=float, metavar="TFLOPS", help="dense bfloat16 (default 989.4, H100 SXM)")
    machine.add_argument("--efficiency", type=float, default=0.4, metavar="PART", help="of the peak (default 0.4)")
    machine.add_argument(
        "--node-bandwidth", type=float, default=300.0, metavar="GBS", help="inside a node (default 300)"
    )
    machine.add_argument(
        "--network-bandwidth", type=float, default=40.0, metavar="GBS", help="between nodes (default 40: 400 Gbit/s)"
    )
    machine.add_argument("--host-bandwidth", type=float, default=25.0, metavar="GBS", help="GPU to host (default 25)")
    machine.add_argument(
        "--host-memory-bandwidth", type=float, default=20.0, metavar="GBS", help="of the host's memory (default 20)"
    )


def run(arguments: argparse.Namespace) -> int:
    from moe_train.launch.advice import advice, with_even_batch
    from moe_train.launch.layout_table import print_json, print_text
    from moe_train.launch.layouts import KEYS, START, propose
    from moe_train.training.run_config import load_run_config

    hardware = _hardware(arguments)
    if arguments.show < 1:
        raise ValueError(f"--show must be at least 1, got {arguments.show}")
    config = load_run_config(arguments.config, [*START, *arguments.overrides])
    overrides = list(arguments.overrides)
    given = {text.split("=", 1)[0] for text in overrides}
    pinned = [key for key in KEYS if key in given]
    proposal = propose(config, hardware, pinned)
    note = ""
    if not proposal.plans and BATCH not in given:
        larger = with_even_batch(config, hardware)
        if (found := propose(larger, hardware, pinned)).plans:
            overrides.append(f"{BATCH}={larger.train.global_batch_size}")
            note = f"planned with {overrides[-1]}: {hardware.gpus} GPUs cannot share {config.train.global_batch_size}"
            config, proposal = larger, found
    helpful = [] if proposal.plans else advice(config, hardware, proposal, pinned)
    if arguments.json:
        print_json(config, hardware, proposal, helpful)
    else:
        every = arguments.all
        command = ["moe-train", "train", arguments.config, *overrides]
        if note:
            print(note)
        print_text(config, hardware, proposal, helpful, command, None if every else arguments.show)
    return 0 if proposal.plans else 1


def _hardware(arguments: argparse.Namespace) -> Hardware:
    """The options' Hardware; its own errors name them."""
    from moe_train.launch.cost_model import Hardware
    from moe_train.training.peak import peak_flops

    if arguments.gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {arguments.gpus}")
    if arguments.device is not None and arguments.peak is not None:
        raise ValueError("--device and --peak both say the peak: give one")
    peak = 989.4 if arguments.peak is None else arguments.peak
    if arguments.device is not None:
        known = peak_flops(arguments.device)
        if known is None:
            raise ValueError(f"--device {arguments.device}: no data sheet of it is known here; give --peak TFLOPS")
        peak = known / 1e12
    return Hardware(
        gpus=arguments.gpus,
        memory=arguments.memory,
        gpus_per_node=arguments.gpus_per_node,
        reserve=arguments.reserve,
        host_memory=arguments.host_memory,
        peak=peak,
        efficiency=arguments.efficiency,
        node_bandwidth=arguments.node_bandwidth,
        network_bandwidth=arguments.network_bandwidth,
        host_bandwidth=arguments.host_bandwidth,
        host_memory_bandwidth=arguments.host_memory_bandwidth,
    )
