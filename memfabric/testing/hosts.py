"""Several hosts on one machine: network namespaces, joined by virtual cables that can be cut and restored.

Responsible for the network only. Processes started with `Host.command` share the machine's memory and files, but reach
each other through their own interfaces alone, with a TCP stack each. Needs Linux, iproute2 (`ip`) and the rights
of root over the network (`CAP_NET_ADMIN`, `CAP_SYS_ADMIN`).

Invariant: when the context is left, its namespaces are gone, and with them their interfaces. What a killed process left
is removed by the next `Hosts` of the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from memfabric.errors import UnavailableError, UsageError

NETWORK = "198.18.0"
"""Addresses of the hosts. Source: RFC 2544 reserves 198.18.0.0/15 for tests between network devices."""
_PREFIX = "memfabric-"
_NAME = re.compile(rf"{_PREFIX}(\d+)-\d+")
_COMMAND_S = 10.0
_CLONE_NEWNET, _CLONE_NEWNS, _CLONE_FS = 0x40000000, 0x00020000, 0x00000200  # setns(2), unshare(2)
_MS_SLAVE, _MS_REC, _MNT_DETACH = 1 << 19, 1 << 14, 2  # mount(2), umount2(2)
_MOST_HOSTS = 200
INTERFACE = "cable"
"""Every host's interface; its other end is in a switch that has no host."""


@dataclass(frozen=True)
class Host:
    """One network namespace.

    Attributes:
        number: from 0.
        name: of the namespace, for ``ip netns``.
        address: its IPv4 address.
    """

    number: int
    name: str
    address: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """A command line that runs `arguments` on this host."""
        return ["ip", "netns", "exec", self.name, *arguments]

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Be on this host: sockets, threads and processes that the calling thread makes in the context are on it.

        The thread sees the host's network under /sys too, which is where UCX looks for devices. From its first time
        in here on, the thread no longer shares its current directory with the process's other threads.

        Raises:
            UnavailableError: the kernel refuses it, or the host is gone.
        """
        with contextlib.ExitStack() as stack:
            here = [stack.enter_context(Path("/proc/thread-self/ns", each).open("rb")) for each in ("net", "mnt")]
            directory = os.open(".", os.O_PATH | os.O_CLOEXEC)
            stack.callback(os.close, directory)

            def go_back() -> None:
                _call("unshare", _CLONE_FS)  # threads that were started here share it, and setns(2) would refuse
                for each in here:
                    _call("setns", each.fileno(), 0)
                os.fchdir(directory)

            try:
                there = stack.enter_context(Path("/run/netns", self.name).open("rb"))
                _call("unshare", _CLONE_NEWNS)
                stack.callback(go_back)
                _call("setns", there.fileno(), _CLONE_NEWNET)
                # As `ip netns exec` does: nothing of this may reach the mounts that others see.
                _call("mount", b"", b"/", None, _MS_SLAVE | _MS_REC, None)
                _call("umount2", b"/sys", _MNT_DETACH)
                _call("mount", b"memfabric", b"/sys", b"sysfs", 0, None)
            except OSError as error:
                raise UnavailableError(f"cannot enter {self.name}: {error}") from error
            yield


class Hosts:
    """Hosts on one switch. A context manager.

    Attributes:
        hosts: in order of their numbers.
    """

    def __init__(self, count: int = 2) -> None:
        """Check that it can be done; the context makes the hosts.

        Raises:
            UsageError: an impossible count. UnavailableError: a tool or a right is missing; says which.
        """
        if not 1 <= count <= _MOST_HOSTS:
            raise UsageError(f"1 to {_MOST_HOSTS} hosts can be made, not {count}")
        why = why_not()
        if why:
            raise UnavailableError(f"hosts cannot be made on this machine: {why}")
        prefix = f"{_PREFIX}{os.getpid()}"
        self._switch = f"{prefix}-{_MOST_HOSTS}"
        self.hosts = tuple(Host(n, f"{prefix}-{n}", f"{NETWORK}.{n + 1}") for n in range(count))

    def __enter__(self) -> Hosts:
        remove_leftovers()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def cut(self, number: int) -> None:
        """Pull a host's cable: packets in both directions are lost without a word. Idempotent."""
        self._in_switch("ip", "link", "set", f"port{number}", "down")

    def restore(self, number: int) -> None:
        """Put the cable back. Idempotent."""
        self._in_switch("ip", "link", "set", f"port{number}", "up")

    # --- inside ---

    def _make(self) -> None:
        _run("ip", "netns", "add", self._switch)
        self._in_switch("ip", "link", "add", "switch", "type", "bridge")
        self._in_switch("ip", "link", "set", "switch", "up")
        for host in self.hosts:
            port = f"port{host.number}"
            _run("ip", "netns", "add", host.name)
            pair = ["type", "veth", "peer", "name", INTERFACE, "netns", host.name]
            self._in_switch("ip", "link", "add", port, *pair)
            self._in_switch("ip", "link", "set", port, "master", "switch", "up")
            inside = host.command
            _run(*inside(["ip", "address", "add", f"{host.address}/24", "dev", INTERFACE]))
            _run(*inside(["ip", "link", "set", INTERFACE, "up"]))
            _run(*inside(["ip", "link", "set", "lo", "up"]))

    def _in_switch(self, *command: str) -> None:
        _run("ip", "netns", "exec", self._switch, *command)

    def _remove(self) -> None:
        for name in (*(host.name for host in self.hosts), self._switch):
            if Path("/run/netns", name).exists():
                _run("ip", "netns", "delete", name)


def why_not() -> str:
    """Why hosts cannot be made here; empty when they can."""
    if shutil.which("ip") is None:
        return "ip not found (Debian's package iproute2)"
    if os.geteuid() != 0:
        return "it takes root's rights over the network; run as root, or under `unshare -Urnm`"
    name = f"{_PREFIX}{os.getpid()}-{_MOST_HOSTS + 1}"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "netns", "delete", name)
    except UnavailableError as error:
        return str(error)
    return ""


def remove_leftovers() -> list[str]:
    """Remove the namespaces of processes that are gone; their names."""
    removed = []
    folder = Path("/run/netns")
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        found = _NAME.fullmatch(path.name)
        if found and not Path("/proc", found.group(1)).exists():
            _run("ip", "netns", "delete", path.name)
            removed.append(path.name)
    return removed


def _call(name: str, *arguments: int | bytes | None) -> None:
    """A system call by its C name.

    Raises:
        OSError: it failed.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _run(*command: str) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COMMAND_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"`{' '.join(command)}`: {error}") from error
    if done.returncode:
        raise UnavailableError(f"`{' '.join(command)}` exited {done.returncode}: {done.stderr.strip()[:300]}")
