"""verbs on a Soft-RoCE device: the conformance suite, and what is particular to verbs."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from transport.base import Exchange
from transport.errors import (
    DescriptorError,
    NotWritableError,
    OutOfMemoryError,
    TimedOutError,
    TransportError,
    UnreachableError,
)
from transport.testing import ConformanceSuite
from transport.testing.owner import pattern
from transport.testing.suite import after, blocks, operations
from transport.verbs import VerbsTransport, devices

KIB, MIB = 1 << 10, 1 << 20


class TestVerbs(ConformanceSuite):
    factory = "transport.verbs:VerbsTransport"
    region_bytes: ClassVar[int] = 2 << 20
    slow = 4.0


class TestVerbsInPieces(ConformanceSuite):
    """Regions of many registrations, short queues, little staging memory."""

    factory = "transport.verbs:VerbsTransport"
    options: ClassVar[dict[str, Any]] = {"chunk_bytes": 12 << 10, "depth": 8, "staging_bytes": 64 << 10}
    region_bytes: ClassVar[int] = 2 << 20
    slow = 4.0


@pytest.fixture
def owner() -> Iterator[VerbsTransport]:
    with VerbsTransport() as made:
        yield made


@pytest.fixture
def client() -> Iterator[VerbsTransport]:
    with VerbsTransport(retries=2) as made:
        yield made


def exchange(owner: VerbsTransport, client: VerbsTransport) -> Exchange:
    return lambda hello, _end_ns: owner.accept(hello, client.identity)


def join(owner: VerbsTransport, client: VerbsTransport, descriptor: bytes, writable: bool = True) -> int:
    return client.connect(descriptor, writable=writable, exchange=exchange(owner, client), deadline_ns=after(30.0))


def test_devices_are_described() -> None:
    (found,) = [each for each in devices() if each.name == os.environ.get("RXE_VM_DEV", "rxe0")]
    assert not found.error
    (port,) = found.ports
    assert (port.state, port.link_layer) == ("active", "Ethernet")
    assert any(str(gid.address) == os.environ["RXE_VM_ADDR"] and gid.kind == "RoCE v2" for gid in port.gids)


def test_memory_that_is_prepared_is_not_staged(owner: VerbsTransport, client: VerbsTransport) -> None:
    region = owner.register(pattern(1, MIB), 1)
    handle = join(owner, client, region.descriptor)
    # Every other 3,000 bytes of the local memory, so that work requests have many segments.
    local = np.zeros(2 * MIB, np.uint8)
    rows = [(2 * at, at, min(3000, MIB - at)) for at in range(0, MIB, 3000)]
    for prepared in (True, False):
        if prepared:
            client.prepare(local.ctypes.data, local.size)
        else:
            client.forget(local.ctypes.data, local.size)
        local[:] = 0
        before = int(client.stats()["staged_bytes"])
        batch = operations(local, handle, rows)
        assert client.read(batch, after(60.0)) == len(rows), batch.error
        for at, remote, length in rows:
            assert (local[at : at + length] == pattern(1, MIB)[remote : remote + length]).all()
            assert not local[at + length : at + 2 * length].any(), "gaps are left alone"
        staged = int(client.stats()["staged_bytes"]) - before
        assert staged == (0 if prepared else MIB)
    region.close()


def test_rights_are_of_the_connection(owner: VerbsTransport, client: VerbsTransport) -> None:
    region = owner.register(np.zeros(MIB, np.uint8), 1, writable=False)
    with pytest.raises(NotWritableError):
        join(owner, client, region.descriptor)
    handle = join(owner, client, region.descriptor, writable=False)
    with pytest.raises(NotWritableError):
        client.write(blocks(np.zeros(4096, np.uint8), handle, 4096), after(10.0))
    region.close()


def test_a_fork_is_told(owner: VerbsTransport) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            owner.register(np.zeros(4096, np.uint8), 1)
        except TransportError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_an_owner_that_hangs_takes_a_client_only_its_time(owner: VerbsTransport, client: VerbsTransport) -> None:
    region = owner.register(pattern(2, MIB), 1)
    release = threading.Event()

    def hang(_hello: bytes, end_ns: int) -> bytes:
        release.wait((end_ns - time.monotonic_ns()) / 1e9)
        raise TimedOutError("the owner did not answer in time")

    def first() -> None:
        with pytest.raises(TransportError):
            client.connect(region.descriptor, writable=True, exchange=hang, deadline_ns=after(20.0))

    thread = threading.Thread(target=first)
    thread.start()
    time.sleep(0.3)
    begun_s = time.monotonic()
    with pytest.raises(TimedOutError, match="another thread"):
        client.connect(region.descriptor, writable=True, exchange=hang, deadline_ns=after(0.5))
    assert time.monotonic() - begun_s < 15.0
    release.set()
    thread.join()
    handle = join(owner, client, region.descriptor)
    data = np.zeros(MIB, np.uint8)
    assert client.read(blocks(data, handle, 64 * KIB), after(60.0)) == 16
    region.close()


@pytest.mark.parametrize("welcome", [b"", b"garbage", bytes(3000), b"\x93\x02\xc0\x90", b"\x93\x01\xc0\x90"])
def test_a_welcome_of_nonsense_is_an_error(owner: VerbsTransport, client: VerbsTransport, welcome: bytes) -> None:
    region = owner.register(np.zeros(4096, np.uint8), 1)
    with pytest.raises(UnreachableError, match="welcome"):
        client.connect(region.descriptor, writable=True, exchange=lambda _hello, _end: welcome, deadline_ns=after(10.0))
    region.close()


@pytest.mark.parametrize("hello", [b"", b"garbage", bytes(3000), b"\x95\x02\xc4\x10" + bytes(16) + b"\xc3\xc0\x90"])
def test_a_hello_of_nonsense_is_an_error(owner: VerbsTransport, hello: bytes) -> None:
    with pytest.raises(DescriptorError):
        owner.accept(hello, bytes(16))
    assert owner.stats()["clients"] == 0


def test_ends_of_clients_that_died_go_away(owner: VerbsTransport) -> None:
    region = owner.register(pattern(3, 64 * KIB), 1)
    data = np.zeros(64 * KIB, np.uint8)
    for _ in range(3):
        with VerbsTransport() as gone:
            assert gone.read(blocks(data, join(owner, gone, region.descriptor), 64 * KIB), after(30.0)) == 1
    end_s = time.monotonic() + 60.0
    while True:  # who comes next has the others asked for signs of life
        with VerbsTransport() as living:
            handle = join(owner, living, region.descriptor)
            time.sleep(1.2)
            assert living.read(blocks(data, handle, 64 * KIB), after(30.0)) == 1, "a living one is left alone"
            if int(owner.stats()["clients"]) <= 3:
                break
            assert time.monotonic() < end_s, owner.stats()
    region.close()


def test_huge_pages(owner: VerbsTransport, client: VerbsTransport) -> None:
    try:
        raw = mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)  # MAP_HUGETLB
    except OSError as error:
        pytest.skip(f"no huge pages are set aside here: {error}")
    memory = np.frombuffer(raw, np.uint8)
    memory[:] = pattern(4, memory.size)
    region = owner.register(memory, 1)
    back = np.zeros(memory.size, np.uint8)
    assert client.read(blocks(back, join(owner, client, region.descriptor), 256 * KIB), after(60.0)) == 16
    assert (back == memory).all()
    region.close()


LITTLE = """
import resource, sys
import numpy as np
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
from transport.errors import OutOfMemoryError, UnreachableError
from transport.verbs import VerbsTransport
with VerbsTransport() as owner, VerbsTransport() as client:
    try:
        owner.register(np.zeros(16 << 20, np.uint8), 1)
    except OutOfMemoryError as error:
        print(error)
    region = owner.register(np.zeros(64 << 10, np.uint8), 2)
    try:
        client.connect(region.descriptor, writable=True, exchange=lambda hello, _end: owner.accept(hello, bytes(16)))
    except UnreachableError as error:
        print(error)
"""


def test_a_small_limit_of_locked_memory_is_said_with_the_fix() -> None:
    drop = "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 14); os.execv(sys.executable, sys.argv[1:])"
    # prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK): whoever has that capability has no limit.
    done = subprocess.run(
        [sys.executable, "-c", drop, sys.executable, "-c", LITTLE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    register, connect = done.stdout.strip().splitlines()
    for told in (register, connect):
        assert "RLIMIT_MEMLOCK" in told
        assert "ulimit -l unlimited" in told
    assert "16777216 bytes" in register


def test_dmabufs_are_refused_in_words(owner: VerbsTransport) -> None:
    with Path("/dev/zero").open("rb") as file, pytest.raises(OutOfMemoryError, match="dma-buf"):
        owner.register_dmabuf(file.fileno(), 0, 4096, 1)
