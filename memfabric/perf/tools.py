"""Other people's meters beside ours: `ucx_perftest` and `ib_write_bw`, where they are installed.

Both ends run on this host. A tool that is missing, fails or takes too long is told of, and never stops a sweep.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import memfabric
from memfabric.units import MIB

TOOL_S = 20.0
"""For a tool and one size, both ends."""
MOST_SIZES = 8
_MOVED_BYTES = 64 * MIB
_OUTSTANDING = 16
_LISTEN = "0A"
"""TCP_LISTEN as /proc/net/tcp writes it."""
_LAUNCH = "import os, sys; from memfabric.processes import die_with_parent; die_with_parent(int(sys.argv[1])); "
_LAUNCH += "os.execvp(sys.argv[2], sys.argv[2:])"


@dataclass(frozen=True)
class Figure:
    """What a tool said.

    Attributes:
        tool: its name. transport: label of the fabric that it stands beside.
        op: ``read`` or ``write``. block_bytes: of one message.
        bytes_per_s: None where it gave none; then `reason` says why.
    """

    tool: str
    transport: str
    op: str
    block_bytes: int
    bytes_per_s: float | None
    reason: str = ""

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.__dict__}


@dataclass(frozen=True)
class _Tool:
    name: str
    arguments: Callable[[str, int, int, int], list[str]]
    parse: Callable[[str], float]
    environment: dict[str, str] = field(default_factory=dict)


def ucx_perftest(
    transport: str, ops: Sequence[str], block_bytes: Sequence[int], options: Mapping[str, Any]
) -> list[Figure]:
    """Bandwidth of ``ucp_get`` and ``ucp_put_bw`` with 16 messages outstanding.

    Args:
        options: of the transport; ``tls``, ``devices`` and ``settings`` go to the tool too.
    """
    settings = options.get("settings")
    environment = {
        f"UCX_{name}": str(value) for name, value in (settings if isinstance(settings, dict) else {}).items()
    }
    for option, variable in (("tls", "UCX_TLS"), ("devices", "UCX_NET_DEVICES")):
        if options.get(option) is not None:
            environment[variable] = str(options[option])
    names = {"read": "ucp_get", "write": "ucp_put_bw"}

    def arguments(op: str, size: int, count: int, port: int) -> list[str]:
        common = ["-t", names[op], "-s", str(size), "-n", str(count), "-w", str(max(1, count // 10))]
        return [*common, "-O", str(_OUTSTANDING), "-f", "-v", "-p", str(port)]

    tool = _Tool("ucx_perftest", arguments, parse_ucx, environment)
    return _measure(tool, transport, ops, block_bytes)


def perftest(
    transport: str, ops: Sequence[str], block_bytes: Sequence[int], options: Mapping[str, Any]
) -> list[Figure]:
    """Bandwidth of ``ib_read_bw`` and ``ib_write_bw``.

    Args:
        options: of the transport; ``device``, ``port`` and ``gid_index`` are the tools' too, which else take the first.
    """
    chosen = []
    for option, flag in (("device", "-d"), ("port", "-i"), ("gid_index", "-x")):
        if options.get(option) is not None:
            chosen += [flag, str(options[option])]
    found = []
    for op in ops:

        def arguments(op: str, size: int, count: int, port: int) -> list[str]:
            return ["-s", str(size), "-n", str(max(5, count)), "-p", str(port), "-F", *chosen]

        found += _measure(_Tool(f"ib_{op}_bw", arguments, parse_perftest), transport, [op], block_bytes)
    return found


def parse_ucx(text: str) -> float:
    """Bytes per second from ``ucx_perftest -f -v``: the column of the overall bandwidth, in MiB/s.

    Source: ucx_perftest 1.13, whose CSV has the header ``iterations,50.0_percentile_lat,avg_lat,overall_lat,avg_bw,
    overall_bw,avg_mr,overall_mr``.

    Raises:
        ValueError: there is no such line.
    """
    for line in reversed(text.splitlines()):
        cells = line.strip().split(",")
        if len(cells) == 8 and cells[0].isdigit():
            return float(cells[5]) * MIB
    raise ValueError("its output has no line of figures")


def parse_perftest(text: str) -> float:
    """Bytes per second from the tools of perftest: the average bandwidth, in MiB/s.

    Source: perftest 4.5, ``#bytes #iterations BW peak[MB/sec] BW average[MB/sec] MsgRate[Mpps]``, MB being 2**20.

    Raises:
        ValueError: there is no such line.
    """
    for line in reversed(text.splitlines()):
        if re.fullmatch(r"\s*\d+\s+\d+(\s+[0-9.]+){3}\s*", line):
            return float(line.split()[3]) * MIB
    raise ValueError("its output has no line of figures")


def _measure(tool: _Tool, transport: str, ops: Sequence[str], block_bytes: Sequence[int]) -> list[Figure]:
    path = shutil.which(tool.name)
    found: list[Figure] = []
    for op in ops:
        for size in block_bytes[:MOST_SIZES]:
            if path is None:
                found.append(Figure(tool.name, transport, op, size, None, "not installed"))
                break  # said once
            try:
                rate = _run(tool, path, op, size)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                found.append(Figure(tool.name, transport, op, size, None, str(error)))
                break  # the other sizes would fail for the same reason
            found.append(Figure(tool.name, transport, op, size, rate))
    return found


def _run(tool: _Tool, path: str, op: str, size: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    count = min(20_000, max(10, _MOVED_BYTES // size))
    end_s = time.monotonic() + TOOL_S
    with ExitStack() as stack:
        command = [path, *tool.arguments(op, size, count, port)]
        far = _start(stack, command, tool.environment)
        while not _listens(port):
            if far.poll() is not None or time.monotonic() > end_s:
                raise ValueError(_complaint(far) or "it did not start to listen")
            time.sleep(0.02)
        near = _start(stack, [*command, "127.0.0.1"], tool.environment)
        try:
            said, _ = near.communicate(timeout=max(0.1, end_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise ValueError(f"not done after {TOOL_S:.0f} s") from None
        if near.returncode:
            raise ValueError(_last_words(said) or f"exit code {near.returncode}")
        return tool.parse(said)


def _start(stack: ExitStack, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    here = str(Path(memfabric.__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **environment, "PYTHONPATH": here},
        start_new_session=True,
    )

    def end() -> None:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()

    stack.callback(end)
    return process


def _listens(port: int) -> bool:
    """Whether somebody on this host listens on a port; connecting would take the tool's one client's place."""
    wanted = f":{port:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()
        except OSError:
            continue
        rows = [line.split() for line in lines]
        if any(row[1].endswith(wanted) and row[3] == _LISTEN for row in rows if len(row) > 3):
            return True
    return False


def _complaint(process: subprocess.Popen[str]) -> str:
    if process.poll() is None or process.stdout is None:
        return ""
    return _last_words(process.stdout.read())


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[-3:])[:300]
