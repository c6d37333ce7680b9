"""Transports, tried: each in a process of its own and for a limited time.

Making a transport loads libraries and drivers of others, which may crash or hang; neither may happen to the process
that asks. `ask` is for the parent, `tell` runs in the child.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
from typing import Any

from memfabric.doctor.findings import shown
from memfabric.processes import die_with_parent
from transport import registry
from transport.errors import TransportError

LIMIT_S = 30
"""A probe takes a fraction of a second; in an emulated machine some seconds."""
_MARK = "memfabric-probe:"
"""Libraries write to standard output, too."""
_MOST_WORDS = 400
# The child looks for modules where the parent does, and not in the directory that it happens to be started in.
_CODE = "import sys; sys.path[:] = sys.argv[3:]; from memfabric.doctor.probe import tell; tell(*sys.argv[1:3])"


@dataclasses.dataclass(frozen=True)
class Probed:
    """What came of trying a transport.

    Attributes:
        name: of the transport.
        why_not: why it can't be used; empty where it can.
        data_path: as in its capabilities.
        info: what it tells about its library (`library`, `version`, `source`, `transports`); may be empty.
        devices: what it tells about RDMA devices (`name`, `error`, `mtu_bytes` by port number); may be empty.
    """

    name: str
    why_not: str = ""
    data_path: str = ""
    info: dict[str, str] = dataclasses.field(default_factory=dict)
    devices: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def fabrics(self) -> list[tuple[str, str]]:
        """(UCX transport, device) of each resource in `info`."""
        found = []
        for line in self.info.get("transports", "").splitlines():
            head, _, resource = line.rpartition(" ")
            if "resource" in head and "/" in resource:
                transport, _, device = resource.partition("/")
                found.append((transport, device))
        return found


def ask(name: str, *, code: str = _CODE, limit_s: float = LIMIT_S) -> Probed:
    """Try a transport. Never raises for what comes of it; ends within a few seconds of `limit_s`.

    Args:
        name: of the transport. `shm` has no library but memfabric's own, and is tried in this process.
        code: what the child runs. limit_s: how long it may take.
    """
    if name == "shm":
        return _understand(name, json.dumps(_look(name)))
    try:
        child = subprocess.Popen(
            [sys.executable, "-c", code, name, str(os.getpid()), *sys.path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        return Probed(name, f"it could not be tried: {error}")
    try:
        out, complaints = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return Probed(name, f"trying it took longer than {limit_s:g} s: a library or driver hangs")
    finally:
        _end(child)
    if child.returncode < 0:
        return Probed(name, f"trying it crashed: {_signal_name(-child.returncode)}")
    for line in reversed(out.decode(errors="replace").splitlines()):
        if line.startswith(_MARK):
            return _understand(name, line.removeprefix(_MARK))
    last = complaints.decode(errors="replace").strip().rpartition("\n")[2]
    return Probed(name, f"trying it failed: {shown(last, _MOST_WORDS) or f'exit code {child.returncode}'}")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill what still runs. A process that hangs in a driver does not die of it, and is not waited for."""
    if child.poll() is None:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1)
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            stream.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _understand(name: str, text: str) -> Probed:
    """The child's answer. A third party's transport ran there: anything may be in it."""
    try:
        told = json.loads(text)
        info = {str(key): str(value) for key, value in told["info"].items()}
        devices = [
            {
                "name": str(each["name"]),
                "error": str(each["error"]),
                "mtu_bytes": {str(port): int(mtu) for port, mtu in each["mtu_bytes"].items()},
            }
            for each in told["devices"]
        ]
        return Probed(name, shown(str(told["why_not"]), _MOST_WORDS), shown(str(told["data_path"])), info, devices)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Probed(name, f"it gave an answer that makes no sense: {shown(repr(error))}")


def tell(name: str, parent_pid: str) -> None:
    """In the child: make the transport, say what it is, end. The child ends with its parent, wherever it hangs."""
    with contextlib.suppress(OSError):  # a sandbox that refuses it says nothing about the transport
        die_with_parent(int(parent_pid))
    sys.stdout.write(f"\n{_MARK}{json.dumps(_look(name))}\n")


def _look(name: str) -> dict[str, Any]:
    answer: dict[str, Any] = {"why_not": "", "data_path": "", "info": {}, "devices": []}
    try:
        with registry.create(name) as made:
            answer["data_path"] = made.capabilities.data_path
            answer["info"] = made.info() if hasattr(made, "info") else {}
    except (TransportError, OSError) as error:
        answer["why_not"] = str(error) or repr(error)
    if name == "verbs":
        answer["devices"] = _verbs_devices()
    return answer


def _verbs_devices() -> list[dict[str, Any]]:
    """What libibverbs knows of devices beyond the kernel's files."""
    try:
        listed = importlib.import_module("transport.verbs").devices()
    except (ImportError, TransportError, OSError):
        return []
    return [
        {
            "name": device.name,
            "error": device.error,
            "mtu_bytes": {port.number: port.mtu_bytes for port in device.ports},
        }
        for device in listed
    ]
