"""The hosts of a launch: hostfiles, the slots that are used, and what may stand in a command line for remote shells.

DeepSpeed's launcher hands pdsh words that the shell of every host reads again, and splits lists of hosts at ``,``,
``@`` and ``:``. So a host is a plain name or an IPv4 address, and nothing that we hand over means anything to a shell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

THIS_MACHINE = ("localhost", "127.0.0.1")
Slots = dict[str, tuple[int, ...]]
"""Host -> the slots on it that get a worker each: numbers of its accelerators."""

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_ADDRESS = re.compile(r"[A-Za-z0-9:][A-Za-z0-9._:-]*")
_READ_IN_QUOTES = '\\"$`'
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]*")


def check_host(name: str, where: str) -> str:
    """The name itself; ValueError where it is no host's: other characters mean something to pdsh, ssh or a shell."""
    if not _HOST.fullmatch(name):
        raise ValueError(
            f"{where}: {name!r} is no host name (letters, digits, '.', '-', '_'; a user or a port goes into "
            "~/.ssh/config)"
        )
    return name


def check_address(address: str) -> str:
    """As ``check_host``, for --master-addr, which may be an IPv6 address."""
    if not _ADDRESS.fullmatch(address):
        raise ValueError(f"--master-addr {address!r} is no host name or address")
    return address


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots, from lines such as ``worker-0 slots=8``. Raises ValueError with the line's number."""
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        where = f"{path}, line {number}"
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", line, re.ASCII)
        if match is None:
            raise ValueError(f"{where}: a line reads `host slots=N`, got {line!r}")
        host = check_host(match[1], where)
        if host in hosts:
            raise ValueError(f"{where}: {host} is named twice; give it the sum of the slots on one line")
        if int(match[2]) < 1:
            raise ValueError(f"{where}: {host} has no slots; leave the line out")
        hosts[host] = int(match[2])
    if not hosts:
        raise ValueError(f"{path}: names no host")
    return hosts


def choose(hosts: Mapping[str, int], include: str = "", exclude: str = "", nodes: int = 0) -> Slots:
    """The slots that are used, in the hostfile's order.

    include, exclude: ``host`` or ``host:0,2``, several joined by ``@``: only these, or all but these.   nodes: the
    first so many hosts of the file; 0: all. Raises ValueError for what is not in the file.
    """
    everything: Slots = {host: tuple(range(slots)) for host, slots in hosts.items()}
    if (include and exclude) or (nodes and (include or exclude)):
        raise ValueError("--include, --exclude and --num-nodes exclude each other")
    if nodes > len(hosts):
        raise ValueError(f"--num-nodes {nodes}, but the hostfile names {len(hosts)}")
    if nodes:
        return dict(list(everything.items())[:nodes])
    if include:
        named = _parse(include, "--include", everything)
        return {host: named[host] for host in everything if host in named}
    named = _parse(exclude, "--exclude", everything) if exclude else {}
    left = {host: tuple(s for s in slots if s not in named.get(host, ())) for host, slots in everything.items()}
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise ValueError(f"--exclude {exclude} leaves no slot")
    return left


def _parse(text: str, option: str, everything: Slots) -> Slots:
    named: Slots = {}
    for part in text.split("@"):
        host, colon, numbers = part.partition(":")
        if host not in everything:
            raise ValueError(f"{option}: {host!r} is not in the hostfile, which names {', '.join(everything)}")
        if host in named:
            raise ValueError(f"{option}: {host} is named twice")
        if colon and not re.fullmatch(r"\d+(,\d+)*", numbers, re.ASCII):
            raise ValueError(f"{option}: slots read `{host}:0,2`, got {part!r}")
        slots = tuple(sorted({int(number) for number in numbers.split(",")})) if colon else everything[host]
        if unknown := [slot for slot in slots if slot not in everything[host]]:
            raise ValueError(f"{option}: {host} has slots 0 to {len(everything[host]) - 1}, not {unknown[0]}")
        named[host] = slots
    return named


def include_text(slots: Slots) -> str:
    """The slots as the launcher's --include."""
    return "@".join(f"{host}:{','.join(map(str, numbers))}" for host, numbers in slots.items())


def check_plain(words: Iterable[str], what: str) -> None:
    """ValueError where one of the words would mean something to the shells of other hosts."""
    for word in words:
        if not _PLAIN.fullmatch(word):
            raise ValueError(f"{what} {word!r} cannot be handed to other hosts: only letters, digits and _@+=:,./- can")


def is_one_line(name: str, value: str) -> bool:
    """Whether the variable can be a line ``NAME=value``: others DeepSpeed's launcher hands to the shells of other hosts
    as they are, or as two lines."""
    return bool(_NAME.fullmatch(name)) and not set(value) & {"\n", "\r"}


def merged_variables(given: Iterable[tuple[str, str]], ours: Mapping[str, str]) -> dict[str, str]:
    """The variables for other hosts.

    given: lines ``NAME=value`` that somebody wrote for DeepSpeed's launcher, each after where it stands.   ours:
    variables with their values. Lines win over variables of the same name. Raises ValueError where a line says what
    only a shell could tell; it does not repeat the line, which may hold a password.
    """
    found = {name: value for name, value in ours.items() if is_one_line(name, value)}
    for where, line in given:
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not _NAME.fullmatch(name.strip()):
            raise ValueError(f"{where}: a line reads `NAME=value`, without `export` and without spaces")
        if any(character in value for character in _READ_IN_QUOTES):
            raise ValueError(
                f"{where}: {name} holds one of {_READ_IN_QUOTES}, which the shells of other hosts would read"
            )
        found[name.strip()] = value.strip()
    return found


def environment_file(variables: Mapping[str, str]) -> str:
    """The file of variables that DeepSpeed's launcher sets on other hosts; shells read them there in double quotes."""
    quoted = {
        name: "".join(f"\\{c}" if c in _READ_IN_QUOTES else c for c in value) for name, value in variables.items()
    }
    return "".join(f"{name}={value}\n" for name, value in quoted.items())
