"""Templates that start the image: they fit it, the command line and each other."""

from __future__ import annotations

import fnmatch
import re
import shlex
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from moe_train.cli import TERMINATED
from moe_train.launch.ending import BAD_NUMBERS, WRONG_INPUT
from moe_train.launch.supervise import Limits
from moe_train.training.run_config import check, load_run_config
from tests.reference.command_line import parse

ROOT = Path(__file__).resolve().parents[3]
ENTRY = (ROOT / "docker" / "entrypoint.sh").read_text()
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
JOB = yaml.safe_load((ROOT / "launcher" / "kubernetes" / "pytorchjob.yaml").read_text())
VARIABLES = set(re.findall(r"\b(MOE_TRAIN_[A-Z_]+|NUM_NODES|NODE_RANK|MASTER_ADDR|MASTER_PORT)\b", ENTRY))
RENDEZVOUS_SECONDS = 600
"""That torchrun's agents wait for one another (torch.distributed.elastic, join timeout of the dynamic rendezvous)."""


def check_training(arguments: list[str], world_size: int) -> None:
    """That the entry point takes the words, and the configuration fits so many processes."""
    assert arguments[0] in ("deepspeed", "torchrun", "srun") and arguments[1] == "train"
    parsed = parse("train", arguments[2:])
    assert parsed.resume == "auto", "a container that is started again goes on"
    check(load_run_config(parsed.config, parsed.overrides), world_size)


def test_training_is_refused_where_it_would_be() -> None:
    with pytest.raises(ValueError, match="procesess"):
        parse("train", ["demo", "--procesess", "2"])
    with pytest.raises(ValueError):
        check_training(["torchrun", "train", "demo", "--resume", "auto"], 3)


# The Dockerfile


def test_default_base_has_a_torch_that_the_package_takes() -> None:
    base = re.search(r"^ARG BASE=pytorch/pytorch:([\d.]+)-cuda", DOCKERFILE, re.MULTILINE)
    assert base is not None
    project = (ROOT / "pyproject.toml").read_text()
    requirement = Requirement(re.search(r'"(torch>=[^"]*)"', project)[1])  # type: ignore[index]
    assert requirement.specifier.contains(Version(base[1]))


def test_nothing_but_the_script_installs_dependencies() -> None:
    """By the script alone, which pins to what the base has; the package comes without them."""
    installs = re.findall(r"pip install[^\n]*", DOCKERFILE)
    assert len(installs) == 1 and "--no-deps" in installs[0]
    assert re.findall(r"^FROM .*$", DOCKERFILE, re.MULTILINE) == [
        *("FROM ${BASE} AS dependencies", "FROM dependencies AS package", "FROM ${BASE}")
    ]


def test_the_builder_gets_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    given = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines
    copied: set[str] = set()
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        copied |= {word for word in line.split()[:-1] if not word.startswith("--")}
    assert given == copied
    assert all((ROOT / name).exists() for name in copied)


def test_no_place_of_a_machine_is_built_in() -> None:
    """What pip needs somewhere reaches a build by a mount."""
    for path in [*(ROOT / "docker").iterdir(), *(ROOT / "launcher").rglob("*.*")]:
        if path.is_file() and path.suffix != ".pyc":
            assert not re.search(r"find-links|trusted-host|/opt/wheels|file://", path.read_text()), path


def uid() -> int:
    found = re.search(r"^ARG UID=(\d+)$", DOCKERFILE, re.MULTILINE)
    assert found is not None and re.search(r"^USER \$\{UID\}$", DOCKERFILE, re.MULTILINE)
    return int(found[1])


# Two nodes with compose

SERVICES = COMPOSE["services"]
NODES = {name: service for name, service in SERVICES.items() if "NODE_RANK" in service.get("environment", {})}


def test_compose_nodes_are_told_apart() -> None:
    assert {int(node["environment"]["NODE_RANK"]) for node in NODES.values()} == set(range(len(NODES)))
    for name, node in NODES.items():
        environment = node["environment"]
        assert int(environment["NUM_NODES"]) == len(NODES) == 2
        assert NODES[environment["MASTER_ADDR"]]["environment"]["NODE_RANK"] == "0"
        assert node["hostname"] == name, "ranks tell each other their host's name"
        assert set(environment) <= VARIABLES
        check_training(node["command"], len(NODES) * int(environment["MOE_TRAIN_PROCESSES"]))


def test_compose_builds_the_image_that_all_services_run() -> None:
    services = SERVICES.values()
    assert len({service["image"] for service in services}) == 1
    build = next(iter(services))["build"]
    assert ((ROOT / "docker" / build["context"]).resolve() / build["dockerfile"]).samefile(
        ROOT / "docker" / "Dockerfile"
    )
    assert set(build["args"]) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))


def test_compose_makes_the_data_of_the_training() -> None:
    data = SERVICES["data"]
    program = data["command"]
    assert program[:2] == ["--", "sh"]
    script = program[-1].replace("\\\n", " ")
    lines = [shlex.split(line)[1:] for line in script.splitlines() if line.strip().startswith("moe-train ")]
    for command, *arguments in lines:
        parse(command, arguments)
    assert [line[0] for line in lines] == ["prepare", "tokenizer", "prepare"]
    made = parse("prepare", lines[-1][1:]).output
    for node in NODES.values():
        assert node["depends_on"]["data"]["condition"] == "service_completed_successfully"
        arguments = parse("train", node["command"][2:])
        config = load_run_config(arguments.config, arguments.overrides)
        assert config.data.train == f"{made}train" and config.data.validation == f"{made}validation"
        for folder in ("data", "runs"):
            assert f"{folder}:/workspace/{folder}" in node["volumes"]
        assert node["environment"]["MOE_TRAIN_RUN_DIR"].startswith("runs/")


def test_compose_waits_longer_than_saving_may_take() -> None:
    for node in NODES.values():
        assert int(node["stop_grace_period"].removesuffix("m")) * 60 > Limits().stop


# Kubernetes

REPLICAS = JOB["spec"]["pytorchReplicaSpecs"]
POD = REPLICAS["Master"]["template"]["spec"]
CONTAINER = POD["containers"][0]
ENVIRONMENT = {item["name"]: item["value"] for item in CONTAINER["env"]}


def test_job_nodes_and_processes_agree() -> None:
    assert (JOB["apiVersion"], JOB["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert REPLICAS["Master"]["replicas"] == 1 and REPLICAS["Worker"]["template"] == REPLICAS["Master"]["template"]
    nodes = sum(replica["replicas"] for replica in REPLICAS.values())
    assert int(ENVIRONMENT["NUM_NODES"]) == nodes
    assert int(ENVIRONMENT["MOE_TRAIN_PROCESSES"]) == CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    assert set(ENVIRONMENT) <= VARIABLES
    assert len(POD["containers"]) == 1 and CONTAINER["name"] == "pytorch", "the name that the operator looks for"
    assert CONTAINER["ports"][0]["name"] == "pytorchjob-port"
    assert "command" not in CONTAINER, "it would replace the entry point"
    check_training(CONTAINER["args"], nodes * int(ENVIRONMENT["MOE_TRAIN_PROCESSES"]))
    assert parse("train", CONTAINER["args"][2:]).max_restarts > 0


def test_job_is_not_root() -> None:
    security = POD["securityContext"]
    assert security["runAsNonRoot"] and security["runAsUser"] == uid()
    assert CONTAINER["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_job_restarts_by_exit_codes() -> None:
    """The operator makes a pod anew from 128 on, and gives up below."""
    assert {replica["restartPolicy"] for replica in REPLICAS.values()} == {"ExitCode"}
    assert TERMINATED >= 128 > BAD_NUMBERS > WRONG_INPUT
    page = (ROOT / "docs" / "running.md").read_text()
    assert f"| {BAD_NUMBERS} | stopped because of its numbers" in page
    assert f"| {WRONG_INPUT} | wrong input" in page and re.search(
        rf"^\|.*\b{TERMINATED}\b.*everything is saved", page, re.M
    )


def test_job_has_time_to_start_to_save_and_to_meet() -> None:
    assert POD["terminationGracePeriodSeconds"] > Limits().stop
    probe = CONTAINER["livenessProbe"]
    assert probe["exec"]["command"] == ["moe-entrypoint", "live"]
    assert probe["initialDelaySeconds"] >= 600
    assert probe["periodSeconds"] * probe["failureThreshold"] >= RENDEZVOUS_SECONDS


def test_nobody_waits_for_a_node_that_is_well() -> None:
    """A node is well once its workers beat, which needs all nodes. The operator's headless services publish no pod that
    is not ready, and its init containers wait for the name of node 0."""
    assert not {"startupProbe", "readinessProbe"} & set(CONTAINER)
    for service in SERVICES.values():
        assert {on["condition"] for on in service.get("depends_on", {}).values()} <= {"service_completed_successfully"}


def test_job_volumes() -> None:
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    places = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert set(places.values()) == set(volumes)
    assert volumes[places["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    place = next(path for path in places if ENVIRONMENT["MOE_TRAIN_RUN_DIR"].startswith(f"{path}/"))
    assert "persistentVolumeClaim" in volumes[places[place]], "checkpoints outlive the pod"


# The page


def test_the_page_names_every_variable_and_way() -> None:
    page = (ROOT / "docs" / "docker.md").read_text()
    assert not {name for name in VARIABLES if f"`{name}`" not in page}
    for argument in re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE):
        assert f"`{argument}`" in page
    for way in re.findall(r"^#   moe-entrypoint (\w+)", ENTRY, re.MULTILINE):
        if way != "COMMAND":
            assert f"`{way}`" in page
    for path in ("docker/compose.yaml", "launcher/kubernetes/pytorchjob.yaml", "launcher/slurm/container.sbatch"):
        assert path in page and (ROOT / path).exists()
    assert fnmatch.filter(page.splitlines(), "*--build-arg BASE=*")
