"""Hostfiles and what is chosen of them; nothing of it reaches a shell as more than a word."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from moe_train.launch.environment import remote_variables, worker_environment
from moe_train.launch.hosts import (
    check_plain,
    choose,
    environment_file,
    include_text,
    read_hostfile,
)
from moe_train.launch.plan import LaunchOptions, command
from moe_train.training.packed import pack, unpack

HOSTS = {"a": 4, "b": 2, "c": 1}
NASTY = ["a;touch x", "$(touch x)", "`touch x`", "a b", "a'b", 'a"b', "x\ny", "%h", "a&b", "~", "*", "ä", "", "\\"]


def write(folder: Path, text: str) -> Path:
    (folder / "hosts").write_text(text)
    return folder / "hosts"


def value(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_a_hostfile(tmp_path: Path) -> None:
    path = write(tmp_path, "# two machines\nworker-0 slots=4\n\n10.0.0.2\t slots=2  # smaller\n")
    assert read_hostfile(path) == {"worker-0": 4, "10.0.0.2": 2}
    options = LaunchOptions(hostfile=path)
    assert (options.world_size, options.local_processes, options.largest_node) == (6, None, 4)
    words = command(options, ["--packed", "abc="], scratch=tmp_path, environment={})
    assert value(words, "--hostfile") == str(path)
    assert value(words, "--include") == "worker-0:0,1,2,3@10.0.0.2:0,1"
    assert "--force_multi" in words and "--num_accelerators" not in words


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "names no host"),
        ("a slots=1\nworker-0\n", "line 2: a line reads"),
        ("worker-0 slots=x\n", "line 1"),
        ("worker-0 slots=-1\n", "line 1"),
        ("worker-0 slots=0\n", "has no slots"),
        ("a slots=1\n# x\na slots=2\n", "line 3: a is named twice"),
        ("a slots=1 extra\n", "line 1"),
        *(
            (f"{name} slots=1\n", "no host name")
            for name in ("a;id", "$(id)", "`id`", "-x", "a,b", "u@a", "a:1", "a[1]")
        ),
    ],
)
def test_broken_hostfiles(tmp_path: Path, text: str, why: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match="hosts") as error:
        LaunchOptions(hostfile=path)
    assert why in str(error.value)


def test_what_is_included() -> None:
    assert choose(HOSTS) == {"a": (0, 1, 2, 3), "b": (0, 1), "c": (0,)}
    # In the hostfile's order, which is the order of ranks.
    assert list(choose(HOSTS, include="c@a:2,0").items()) == [("a", (0, 2)), ("c", (0,))]
    assert choose(HOSTS, exclude="b@a:1") == {"a": (0, 2, 3), "c": (0,)}
    assert choose(HOSTS, exclude="c:0") == {"a": (0, 1, 2, 3), "b": (0, 1)}
    assert choose(HOSTS, nodes=2) == {"a": (0, 1, 2, 3), "b": (0, 1)}
    assert include_text({"a": (0, 2), "c": (0,)}) == "a:0,2@c:0"


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"include": "d"}, "'d' is not in the hostfile, which names a, b, c"),
        ({"exclude": "a@d"}, "'d' is not"),
        ({"include": "b:2"}, "b has slots 0 to 1, not 2"),
        ({"include": "b:x"}, "slots read"),
        ({"include": "a@a"}, "named twice"),
        ({"include": "a,b"}, "'a,b' is not"),
        ({"exclude": "a@b@c"}, "leaves no slot"),
        ({"include": "a", "exclude": "b"}, "exclude each other"),
        ({"include": "a", "nodes": 2}, "exclude each other"),
        ({"nodes": 4}, "names 3"),
    ],
)
def test_what_cannot_be_chosen(wanted: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        choose(HOSTS, **wanted)  # type: ignore[arg-type]


def test_deepspeed_understands_the_choice_as_we_do() -> None:
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    for include, exclude in (("c@a:2,0", ""), ("", "b@a:1"), ("", "")):
        chosen = choose(HOSTS, include, exclude)
        theirs = parse_inclusion_exclusion(HOSTS, include, exclude)
        assert {host: tuple(slots) for host, slots in theirs.items()} == chosen
        again = parse_inclusion_exclusion(HOSTS, include_text(chosen), "")
        assert {host: tuple(slots) for host, slots in again.items()} == chosen


def test_a_node_without_ssh_takes_its_slots_from_the_hostfile(tmp_path: Path) -> None:
    path = write(tmp_path, "a slots=4\nb slots=2\n")
    options = LaunchOptions(hostfile=path, no_ssh=True, node_rank=1)
    assert (options.world_size, options.local_processes, options.by_ssh) == (6, 2, False)
    words = command(options, ["x"], scratch=tmp_path, environment={})
    assert (value(words, "--node_rank"), value(words, "--master_addr")) == ("1", "a") and "--no_ssh" in words
    with pytest.raises(ValueError, match="--node-rank must lie between 0 and 1, got 2"):
        LaunchOptions(hostfile=path, no_ssh=True, node_rank=2)


def test_this_machine_alone_needs_no_ssh(tmp_path: Path) -> None:
    options = LaunchOptions(hostfile=write(tmp_path, "localhost slots=2\n"))
    assert (options.by_ssh, options.local_processes) == (False, 2)
    words = command(options, ["x"], scratch=tmp_path, environment={})
    assert value(words, "--hostfile") == "" and value(words, "--num_accelerators") == "2"
    one = LaunchOptions(hostfile=write(tmp_path, "localhost slots=4\n"), include="localhost:1,3")
    words = command(one, ["x"], scratch=tmp_path, environment={"CUDA_VISIBLE_DEVICES": "4,5,6,7"})
    assert value(words, "--include") == "localhost:5,7"


def test_one_other_host_is_not_taken_for_this_machine(tmp_path: Path) -> None:
    options = LaunchOptions(hostfile=write(tmp_path, "worker-3 slots=2\n"))
    assert options.by_ssh and "--force_multi" in command(options, ["x"], scratch=tmp_path, environment={})


def test_a_wrong_choice_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = write(tmp_path, "a slots=1\n")
    for wrong in ({"include": "b"}, {"exclude": "b"}, {"nodes": 2}, {"node_rank": 1}, {"master_addr": "$(id)"}):
        with pytest.raises(ValueError):
            LaunchOptions(hostfile=path, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--hostfile"):
        LaunchOptions(include="a")


@pytest.mark.parametrize("text", NASTY)
def test_arguments_survive_every_shell(text: str, tmp_path: Path) -> None:
    """Read by a shell as pdsh's are, joined by blanks and without quotes."""
    arguments = ["--run-dir", f"runs/{text}", "--resume", text]
    words = pack(arguments)
    check_plain(words, "argument")
    line = f"printf '%s\\n' {' '.join(words)}"
    seen = subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert unpack(seen.splitlines()) == arguments
    assert list(tmp_path.iterdir()) == []


def test_unpacked_words_stand_in_their_place() -> None:
    assert unpack(["--local_rank=1", *pack(["--run-dir", "r"]), "--status", "x"]) == [
        *("--local_rank=1", "--run-dir", "r", "--status", "x")
    ]
    with pytest.raises(ValueError, match="damaged"):
        unpack(["--packed", "W10"])


@pytest.mark.parametrize("text", [text for text in NASTY if text])
def test_what_a_shell_would_read_is_not_handed_over(text: str, tmp_path: Path) -> None:
    options = LaunchOptions(hostfile=write(tmp_path, "a slots=1\nb slots=1\n"))
    with pytest.raises(ValueError, match="cannot be handed to other hosts"):
        command(options, ["--run-dir", text], scratch=tmp_path, environment={})


def test_a_folder_that_a_shell_would_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = LaunchOptions(hostfile=write(tmp_path, "a slots=1\nb slots=1\n"))
    (tmp_path / "$(id)").mkdir()
    monkeypatch.chdir(tmp_path / "$(id)")
    with pytest.raises(ValueError, match="working folder"):
        command(options, ["x"], scratch=tmp_path, environment={})


def as_a_host_sees_them(content: str, names: list[str]) -> list[str]:
    """The variables after DeepSpeed has written its command and a shell has read it."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    for line in content.splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {key}={value}; " for key, value in runner.exports.items())
    script = exports + "".join(f'printf "%s\\n" "${name}"; ' for name in names)
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()


def test_variables_arrive_as_they_are() -> None:
    values = ["/a b:/c", "$(echo x)", "`id`", 'say "hi" \\ $HOME', "plain"]
    ours = {f"NCCL_{number}": value for number, value in enumerate(values)}
    assert as_a_host_sees_them(environment_file(ours), list(ours)) == values


def test_variables_for_other_hosts(tmp_path: Path) -> None:
    hosts = write(tmp_path, "worker-0 slots=4\nworker-1 slots=2\n")
    base = {"HOME": "/h", "SECRET_TOKEN": "s", "NCCL_DEBUG": "WARN", "PYTHONPATH": "/p"}
    environment = worker_environment(LaunchOptions(hostfile=hosts), base, cpu=True, cores=8)
    assert environment["OMP_NUM_THREADS"] == "2"
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n\n# ours\nDS_ACCELERATOR=theirs\n")
    lines = environment_file(remote_variables(environment, [tmp_path, tmp_path / "nowhere"])).splitlines()
    assert {"NCCL_DEBUG=INFO", "DS_ACCELERATOR=theirs", "OMP_NUM_THREADS=2", "MALLOC_MMAP_MAX_=0"} <= set(lines)
    assert any(line.startswith("PYTHONPATH=") and line.endswith(":/p") for line in lines)
    assert not any(word in line for line in lines for word in ("HOME", "SECRET", "cpu"))
    (tmp_path / "other").write_text("NCCL_DEBUG=TRACE\n")
    assert remote_variables({**environment, "DS_ENV_FILE": "other"}, [tmp_path])["NCCL_DEBUG"] == "TRACE"
    with pytest.raises(ValueError, match="no such file"):
        remote_variables({"DS_ENV_FILE": "absent"}, [tmp_path])


def test_what_is_no_line_does_not_reach_the_shells_of_other_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed's launcher exports variables of its own environment by itself, whatever is in them."""
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import EXPORT_ENVS

    monkeypatch.chdir(tmp_path)
    base = {"UCX_A": "a\n$(touch owned)", "UCX_B": "a\r;touch owned;B=1", "UCX_C;touch owned;C": "1", "UCX_D": "d"}
    base |= {"BASH_FUNC_x%%": "() {\n}", "PYTHONPATH": "/p\n$(touch owned)"}
    one = LaunchOptions(hostfile=write(tmp_path, "localhost slots=1\n"))
    assert base.items() <= worker_environment(one, base, cpu=True).items(), "no shell is between these"
    assert capsys.readouterr().err == ""
    several = LaunchOptions(hostfile=write(tmp_path, "a slots=1\nb slots=1\n"))
    environment = worker_environment(several, base, cpu=True)
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and "'PYTHONPATH', 'UCX_A', 'UCX_B', 'UCX_C;touch owned;C'" in said and "BASH" not in said
    )
    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    for name, value in environment.items():
        if name.startswith(tuple(EXPORT_ENVS)):
            runner.add_export(name, value)
    exports = "".join(f"export {key}={value}; " for key, value in runner.exports.items())
    subprocess.run(["sh", "-c", exports], check=True)
    lines = environment_file(remote_variables(environment, [])) + environment_file(remote_variables(base, []))
    as_a_host_sees_them(lines, [])
    assert "UCX_D=d\n" in lines and f"PYTHONPATH={tmp_path}\n" in lines
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "line",
    ["NCCL_DEBUG", "A B=s3cret", "export A=s3cret", "A;id=1", "A=$(id)", "A=s3cret`id`", 'A="x', "A=\\x", "1A=2"],
)
def test_wrong_lines_of_the_environment_file(tmp_path: Path, line: str) -> None:
    """It is told where the line stands, not what it holds: the message is in everybody's log."""
    file = tmp_path / ".deepspeed_env"
    file.write_text(f"# ours\n\n{line}\n")
    with pytest.raises(ValueError, match=f"{file}, line 3: ") as caught:
        remote_variables({}, [tmp_path])
    assert "s3cret" not in str(caught.value)
