"""The command lines that start the workers."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from moe_train.launch.environment import worker_environment
from moe_train.launch.hosts import read_hostfile
from moe_train.launch.plan import LaunchOptions, command, free_port, own_address
from moe_train.launch.run import default_processes
from moe_train.training.run_config import load_run_config


def line(options: LaunchOptions, scratch: Path, environment: dict[str, str] | None = None) -> list[str]:
    return command(options, ["--run-dir", "r"], scratch=scratch, environment=environment or {})


def value(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_deepspeed_on_one_machine(tmp_path: Path) -> None:
    words = line(LaunchOptions(processes=2), tmp_path)
    assert words[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert value(words, "--num_accelerators") == "2"
    assert value(words, "--hostfile") == ""
    assert words[-4:] == ["--module", "moe_train.training", "--run-dir", "r"]
    assert list(tmp_path.iterdir()) == []


def test_two_runs_get_two_ports(tmp_path: Path) -> None:
    first = int(value(line(LaunchOptions(), tmp_path), "--master_port"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        assert free_port() != first


def test_visible_devices_are_respected(tmp_path: Path) -> None:
    words = line(LaunchOptions(processes=2), tmp_path, {"CUDA_VISIBLE_DEVICES": "2,3,5"})
    assert value(words, "--include") == "localhost:2,3"
    assert "--num_accelerators" not in words


@pytest.mark.parametrize("visible", ["2", "GPU-abc,GPU-def"])
def test_visible_devices_that_do_not_do(tmp_path: Path, visible: str) -> None:
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        line(LaunchOptions(processes=2), tmp_path, {"CUDA_VISIBLE_DEVICES": visible})


def test_one_node_of_two_without_ssh(tmp_path: Path) -> None:
    options = LaunchOptions(processes=3, no_ssh=True, nodes=2, node_rank=1, master_addr="10.0.0.1", master_port=5000)
    words = line(options, tmp_path)
    assert read_hostfile(Path(value(words, "--hostfile"))) == {"node-0": 3, "node-1": 3}
    assert "--no_ssh" in words
    found = [value(words, f"--{name}") for name in ("node_rank", "master_addr", "master_port")]
    assert found == ["1", "10.0.0.1", "5000"]
    assert (options.world_size, options.local_processes) == (6, 3)


def test_several_nodes_agree_on_a_port(tmp_path: Path) -> None:
    options = [LaunchOptions(no_ssh=True, nodes=2, node_rank=rank, master_addr="a") for rank in (0, 1)]
    assert [value(line(option, tmp_path), "--master_port") for option in options] == ["29500", "29500"]


def test_on_the_processor_no_worker_sees_an_accelerator() -> None:
    base = {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "3"}
    environment = worker_environment(LaunchOptions(processes=2), base, cpu=True, cores=8)
    assert environment["CUDA_VISIBLE_DEVICES"] == "" and environment["DS_ACCELERATOR"] == "cpu"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert worker_environment(LaunchOptions(processes=2), base, cpu=False)["CUDA_VISIBLE_DEVICES"] == "0"


def test_torchrun(tmp_path: Path) -> None:
    words = line(LaunchOptions(launcher="torchrun", processes=2, nodes=2, no_ssh=True, master_addr="a"), tmp_path)
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert [value(words, f"--{name}") for name in ("nproc-per-node", "nnodes", "master-addr")] == ["2", "2", "a"]


def test_agents_tell_each_other_an_address(tmp_path: Path) -> None:
    options = LaunchOptions(
        "torchrun", nodes=2, no_ssh=True, node_rank=1, master_addr="127.0.0.1", master_port=5000, max_restarts=1
    )
    words = line(options, tmp_path)
    assert value(words, "--local-addr") == "127.0.0.1" and value(words, "--rdzv-endpoint") == "127.0.0.1:5000"
    assert value(words, "--rdzv-conf") == "is_host=false"
    assert own_address("no host", 1) is None
    assert "--local-addr" not in line(LaunchOptions("torchrun", max_restarts=1), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"processes": 0},
        {"launcher": "none", "processes": 2},
        {"nodes": 2},
        {"nodes": 2, "no_ssh": True},
        {"nodes": 2, "no_ssh": True, "master_addr": "a", "node_rank": 2},
        {"hostfile": Path("nowhere")},
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="--"):
        LaunchOptions(**options)


def test_environment() -> None:
    options = LaunchOptions(processes=2)
    assert worker_environment(options, {}, cpu=True, cores=8)["OMP_NUM_THREADS"] == "4"
    assert worker_environment(options, {}, cpu=True, cores=1)["OMP_NUM_THREADS"] == "1"
    assert worker_environment(options, {"OMP_NUM_THREADS": "3"}, cpu=True, cores=8)["OMP_NUM_THREADS"] == "3"
    assert worker_environment(options, {}, cpu=True)["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in worker_environment(options, {}, cpu=False)


def test_default_number_of_processes() -> None:
    config = load_run_config("demo")
    assert default_processes(config, accelerators=0) == 2
    assert default_processes(config, accelerators=8) == 8
    assert default_processes(config, accelerators=0, nodes=2) == 1


def test_torchruns_restarts_get_a_store_of_their_own() -> None:
    """Else workers of the second start read the addresses of the first from it, and connect to nobody."""
    name = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    for launcher, restarts, there in (("torchrun", 3, True), ("torchrun", 0, False), ("deepspeed", 3, False)):
        options = LaunchOptions(processes=2, launcher=launcher, max_restarts=restarts)
        assert (worker_environment(options, {}, cpu=True, cores=8).get(name) == "1") == there
