"""A plain socket stream, the limit for what travels over TCP: one connection, `sendall` and `recv_into`, nothing else.

Run as a program it is the far end: ``python -m memfabric.perf.stream ADDRESS [PARENT_PID]`` prints its port and serves
one client at a time; it ends with its parent if it is told who that is.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import memfabric
from memfabric.errors import UnavailableError
from memfabric.perf.blocks import Bytes, aligned
from memfabric.processes import die_with_parent

_ORDER = struct.Struct("<cQ")
_FETCH, _STORE = b"F", b"S"
MOST_BYTES = 1 << 30
PART_BYTES = 64 << 20
"""Longest transfer that sweeps make at once: both ends hold as much."""
_FIRST_BYTES = 1 << 20


class Stream:
    """The near end. `fetch` and `store` move bytes as `get` and `put` do, and return the nanoseconds that it took."""

    def __init__(self, address: str, port: int, timeout_s: float = 30.0) -> None:
        self._socket = socket.create_connection((address, port), timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fetch(self, into: Bytes) -> int:
        """Bytes from there to here."""
        begin = time.perf_counter_ns()
        self._socket.sendall(_ORDER.pack(_FETCH, into.size))
        _receive(self._socket, into.reshape(-1).data)
        return time.perf_counter_ns() - begin

    def store(self, data: Bytes) -> int:
        """Bytes from here to there, until the other side says that it has them."""
        begin = time.perf_counter_ns()
        self._socket.sendall(_ORDER.pack(_STORE, data.size))
        self._socket.sendall(data.reshape(-1).data)
        _receive(self._socket, memoryview(bytearray(1)))
        return time.perf_counter_ns() - begin

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()


def _receive(connection: socket.socket, into: memoryview) -> None:
    at = 0
    while at < len(into):
        got = connection.recv_into(into[at:])
        if not got:
            raise ConnectionError("the other end closed the stream")
        at += got


@contextmanager
def far_end(address: str) -> Iterator[int]:
    """A far end in a process of its own, which ends with the context or with this process; its port.

    Raises:
        UnavailableError: it did not start; with what it said.
    """
    command = [sys.executable, "-m", "memfabric.perf.stream", address, str(os.getpid())]
    here = str(Path(memfabric.__file__).parent.parent)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env={**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]).strip(":")},
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        if not line.strip().isdigit():
            process.kill()
            said = process.stderr.read().decode(errors="replace").strip()[-2000:]
            raise UnavailableError(f"the far end of the socket stream did not start:\n{said}")
        yield int(line)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def serve(address: str) -> None:
    """The far end, until it is ended."""
    with socket.create_server((address, 0)) as server:
        sys.stdout.write(f"{server.getsockname()[1]}\n")
        sys.stdout.flush()
        memory = aligned(_FIRST_BYTES)
        while True:
            connection, _ = server.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection:
                try:
                    while True:
                        memory = _serve_one(connection, memory)
                except ConnectionError:
                    continue


def _serve_one(connection: socket.socket, memory: Bytes) -> Bytes:
    order = bytearray(_ORDER.size)
    _receive(connection, memoryview(order))
    what, size = _ORDER.unpack(order)
    if size > MOST_BYTES:
        raise ConnectionError(f"{size} bytes asked for")
    if size > memory.size:
        memory = aligned(size)  # grows with the first, largest transfers: warm up before timing
    if what == _FETCH:
        connection.sendall(memory[:size].data)
    else:
        _receive(connection, memory[:size].data)
        connection.sendall(b"!")
    return memory


if __name__ == "__main__":
    if len(sys.argv) > 2:
        die_with_parent(int(sys.argv[2]))
    serve(sys.argv[1])
