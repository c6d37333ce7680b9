"""A plain socket stream, the limit for what travels over TCP: one connection, `sendall` and `recv_into`, nothing else.

Run as a program it is the far end: ``python -m memfabric.perf.stream ADDRESS [PARENT_PID]`` prints its port and serves
one client at a time; it ends with its parent if it is told who that is.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from types import TracebackType

from memfabric.perf.blocks import Bytes, aligned, fill
from memfabric.processes import die_with_parent

_ORDER = struct.Struct("<cQ")
_FETCH, _STORE = b"F", b"S"
MOST_BYTES = 1 << 30


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


def serve(address: str) -> None:
    """The far end, until it is ended."""
    with socket.create_server((address, 0)) as server:
        sys.stdout.write(f"{server.getsockname()[1]}\n")
        sys.stdout.flush()
        memory = aligned(64 << 20)
        fill(memory, seed=7)
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
        memory = aligned(size)
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
