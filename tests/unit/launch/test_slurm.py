"""A worker's place from Slurm's variables."""

from __future__ import annotations

import pytest

from moe_train.launch.plan import LaunchOptions
from moe_train.launch.slurm import check_devices, hosts_of, launch_of_step, number_of_tasks, worker_variables

TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "gpu[01-02]",
}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("a,b.c", ["a", "b.c"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("n[1,3-4],login,m[007]", ["n1", "n3", "n4", "login", "m007"]),
        ("r[1-2]n[5,7]", ["r1n5", "r1n7", "r2n5", "r2n7"]),
        ("gpu[1-2]-ib", ["gpu1-ib", "gpu2-ib"]),
    ],
)
def test_lists_of_hosts(text: str, hosts: list[str]) -> None:
    assert list(hosts_of(text)) == hosts


@pytest.mark.parametrize("text", ["", "a[", "a]", "a[1", "a[x]", "a[1-]", "a;id", "$(id)", "a,,b", "a[]", "a[-1]"])
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(ValueError, match="a list of hosts reads"):
        list(hosts_of(text))


def test_the_place_of_a_task() -> None:
    found = worker_variables(TASK)
    port = found.pop("MASTER_PORT")
    assert found == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu01"}
    assert 20000 <= int(port) < 30000
    assert worker_variables(TASK | {"SLURM_PROCID": "0"})["MASTER_PORT"] == port
    assert worker_variables(TASK | {"SLURM_JOB_ID": "4712"})["MASTER_PORT"] != port
    assert worker_variables(TASK | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != port
    chosen = worker_variables(TASK, "10.0.0.1", 5)
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("10.0.0.1", "5")


def test_the_step_goes_before_the_job() -> None:
    step = TASK | {"SLURM_STEP_NODELIST": "gpu02", "SLURM_STEP_NUM_TASKS": "6"}
    found = worker_variables(step)
    assert (found["MASTER_ADDR"], found["WORLD_SIZE"]) == ("gpu02", "6")


def test_the_name_of_a_step() -> None:
    """The same for all tasks, and another one for a job that was queued again."""
    names = [
        launch_of_step(TASK | more)
        for more in ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "4712"})
    ]
    assert len(set(names)) == 4 and launch_of_step(TASK | {"SLURM_PROCID": "0"}) == names[0]


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_ID"])
def test_outside_of_a_step(missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        number_of_tasks({name: value for name, value in TASK.items() if name != missing})


def test_every_task_sees_its_device() -> None:
    check_devices(TASK, 0)
    check_devices(TASK, 2)
    with pytest.raises(ValueError, match="gpu-bind"):
        check_devices(TASK, 1)


def test_options() -> None:
    assert LaunchOptions("srun", tasks=8).world_size == 8
    for wrong in ({"processes": 2}, {"nodes": 2}, {"no_ssh": True}, {"max_restarts": 1}):
        with pytest.raises(ValueError, match="srun"):
            LaunchOptions("srun", tasks=8, **wrong)  # type: ignore[arg-type]


def test_a_port_out_of_range() -> None:
    with pytest.raises(ValueError, match="--master-port"):
        LaunchOptions(master_port=70000)
