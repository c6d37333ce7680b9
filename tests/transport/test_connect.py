"""Client side: descriptors, connections and their end, other processes, forks, large offsets."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.transport.conftest import Script, one, random_bytes
from transport import (
    Batch,
    BoundsError,
    DescriptorError,
    NotConnectedError,
    ShmTransport,
    UnreachableError,
    digest,
)

fuzz = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def changed(descriptor: bytes, **fields: Any) -> bytes:
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(descriptor), **fields})


def test_handles_are_small_and_reused_only_after_disconnect(shm: ShmTransport) -> None:
    with shm.create_region("node", 0, 4096) as region:
        handles = [shm.connect(region.descriptor, writable=False) for _ in range(200)]
        assert handles == list(range(200))
        shm.disconnect(7)
        shm.disconnect(3)
        assert shm.connect(region.descriptor, writable=True) == 3
        assert shm.connect(region.descriptor, writable=True) == 7
        assert shm.connect(region.descriptor, writable=True) == 200


def test_a_disconnected_handle_is_refused_everywhere(shm: ShmTransport) -> None:
    with shm.create_region("node", 0, 4096) as region:
        handle = shm.connect(region.descriptor, writable=True)
        view = shm.mapped(handle)
        shm.disconnect(handle)
        with pytest.raises(NotConnectedError):
            shm.disconnect(handle)
        with pytest.raises(NotConnectedError):
            shm.mapped(handle)
        with pytest.raises(NotConnectedError, match="handle 0"):
            shm.read(one(np.zeros(8, np.uint8), handle))
        region.buffer[:] = 9
        assert (view == 9).all(), "a view outlives its handle"


@pytest.mark.parametrize("handle", [-1, 0, 1, 65536, 2**31 - 1])
def test_handles_never_given_are_refused(shm: ShmTransport, handle: int) -> None:
    with pytest.raises(NotConnectedError):
        shm.mapped(handle)
    with pytest.raises(NotConnectedError):
        shm.disconnect(handle)


def test_close_disconnects_and_may_be_repeated(directory: Path) -> None:
    with ShmTransport(directory) as shm, shm.create_region("node", 0, 4096) as region:
        handle = shm.connect(region.descriptor, writable=True)
        shm.close()
        with pytest.raises(NotConnectedError):
            shm.mapped(handle)
        shm.close()


@pytest.mark.parametrize("writable", [False, True])
def test_prefault_changes_nothing(shm: ShmTransport, writable: bool) -> None:
    with shm.create_region("node", 0, (1 << 20) + 5) as region:
        region.buffer[:] = random_bytes(region.size_bytes)
        before = digest(region.buffer)
        handle = shm.connect(region.descriptor, writable=writable)
        shm.prefault(handle)
        assert digest(shm.mapped(handle)) == before
        with pytest.raises(NotConnectedError):
            shm.prefault(handle + 1)


def test_capabilities(shm: ShmTransport) -> None:
    able = shm.capabilities
    assert (able.name, able.one_sided, able.inline_digest, able.zero_copy) == ("shm", True, True, True)
    assert able.fences == frozenset()


def test_the_region_outlives_its_owner_for_those_who_are_connected(shm: ShmTransport) -> None:
    region = shm.create_region("node", 0, 4096)
    region.buffer[:] = 5
    handle = shm.connect(region.descriptor, writable=False)
    descriptor = region.descriptor
    region.close()
    into = np.zeros(4096, np.uint8)
    shm.read(one(into, handle))
    assert (into == 5).all()
    with pytest.raises(UnreachableError, match="does not exist"):
        shm.connect(descriptor, writable=False)


def test_a_descriptor_never_leads_to_a_later_region_of_the_same_name(shm: ShmTransport) -> None:
    old = shm.create_region("node", 0, 4096)
    keep = old.buffer  # the inode can't be given out again while it is mapped
    old.close()
    with shm.create_region("node", 0, 4096), pytest.raises(UnreachableError, match="not the file"):
        shm.connect(old.descriptor, writable=False)
    assert keep.size == 4096


def test_descriptor_of_another_host_size_or_device_is_unreachable(shm: ShmTransport) -> None:
    with shm.create_region("node", 0, 4096) as region:
        for fields in (
            {"boot_id": "00000000-0000-0000-0000-000000000000"},
            {"size_bytes": 8192},
            {"size_bytes": 1 << 46},
            {"device": 1},
            {"inode": 1},
        ):
            with pytest.raises(UnreachableError) as refused:
                shm.connect(changed(region.descriptor, **fields), writable=False)
            assert not isinstance(refused.value, DescriptorError)


@pytest.mark.parametrize(
    "fields",
    [
        {"path": "/etc/passwd"},
        {"path": "memfabric.node.0"},
        {"path": ""},
        {"path": "\0"},
        {"path": 5},
        {"size_bytes": 0},
        {"size_bytes": -1},
        {"size_bytes": 1 << 63},
        {"size_bytes": 4096.5},
        {"size_bytes": "4096"},
        {"device": -1},
        {"inode": None},
        {"boot_id": 3},
        {"transport": "ucx"},
    ],
)
def test_impossible_descriptors_are_refused(shm: ShmTransport, fields: dict[str, Any]) -> None:
    with shm.create_region("node", 0, 4096) as region, pytest.raises(DescriptorError):
        shm.connect(changed(region.descriptor, **fields), writable=False)


@pytest.mark.parametrize("path", ["{}/../x/memfabric.node.0", "{}/./memfabric.node.0", "{}//memfabric.node.0", "{}/x"])
def test_paths_out_of_the_directory_are_refused(shm: ShmTransport, directory: Path, path: str) -> None:
    with shm.create_region("node", 0, 4096) as region, pytest.raises(DescriptorError, match="path"):
        shm.connect(changed(region.descriptor, path=path.format(directory)), writable=False)


def test_what_is_no_regular_file_is_refused(shm: ShmTransport, directory: Path) -> None:
    with shm.create_region("node", 0, 4096) as region:
        path = directory / "memfabric.trick.0"
        descriptor = changed(region.descriptor, path=str(path))
        path.symlink_to(directory / "memfabric.node.0")
        with pytest.raises(UnreachableError):
            shm.connect(descriptor, writable=False)
        path.unlink()
        os.mkfifo(path)
        for writable in (False, True):
            with pytest.raises(UnreachableError):
                shm.connect(descriptor, writable=writable)
        path.unlink()


@given(st.binary(max_size=200))
@fuzz
def test_garbage_is_refused(shm: ShmTransport, garbage: bytes) -> None:
    with pytest.raises(DescriptorError):
        shm.connect(garbage, writable=False)


@given(data=st.data())
@fuzz
def test_damaged_descriptors_never_reach_anything(shm: ShmTransport, data: st.DataObject) -> None:
    with shm.create_region("node", 0, 4096) as region:
        damaged = bytearray(region.descriptor)
        # What is drawn must not depend on the descriptor: its length differs from one region to the next.
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, 9999)) % len(damaged)] = data.draw(st.integers(0, 255))
        damaged = damaged[: data.draw(st.integers(0, 500) | st.just(9999))]
        if says_the_same(bytes(damaged), region.descriptor):
            return
        with pytest.raises(UnreachableError):
            shm.connect(bytes(damaged), writable=False)


def says_the_same(a: bytes, b: bytes) -> bool:
    """Whether two byte strings say the same to a decoder that skips unknown fields."""
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, TypeError):
        fields = msgspec.msgpack.decode(b)
        other = msgspec.msgpack.decode(a)
        return isinstance(other, dict) and all(other.get(name) == fields[name] for name in fields)
    return a == b


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_like)
@fuzz
def test_well_formed_nonsense_is_refused(shm: ShmTransport, value: Any) -> None:
    with pytest.raises(DescriptorError):
        shm.connect(msgspec.msgpack.encode(value), writable=False)


@pytest.mark.parametrize("descriptor", [b"\x81" * 100_000, b"\x91" * 4000, None, 5, "text"])
def test_long_deep_or_no_bytes_are_refused(shm: ShmTransport, descriptor: Any) -> None:
    with pytest.raises(DescriptorError):
        shm.connect(descriptor, writable=False)


def test_offsets_beyond_4_gib(shm: ShmTransport, directory: Path) -> None:
    size = (6 << 30) + 4096
    path = directory / "memfabric.sparse.0"
    with path.open("xb") as file:
        file.truncate(size)
        status = os.fstat(file.fileno())
    with shm.create_region("node", 0, 4096) as small:
        descriptor = changed(
            small.descriptor, path=str(path), size_bytes=size, device=status.st_dev, inode=status.st_ino
        )
    handle = shm.connect(descriptor, writable=True)
    data = random_bytes(100_000)
    offsets = [(4 << 30) - 50_000, (5 << 30) + 3, size - data.size]
    for offset in offsets:
        assert shm.write(one(data, handle, offset)) == 1
        landed = np.zeros_like(data)
        assert shm.read(one(landed, handle, offset)) == 1
        assert np.array_equal(landed, data)
        with path.open("rb") as file:
            assert os.pread(file.fileno(), data.size, offset) == data.tobytes()
    with pytest.raises(BoundsError):
        shm.write(one(data, handle, size - data.size + 1))
    with path.open("rb") as file:
        assert os.pread(file.fileno(), 4096, offsets[0] & 0xFFFFFFFF & ~4095) != data[:4096].tobytes()
        assert not any(os.pread(file.fileno(), 1 << 20, 0)), "nothing wrapped to the start"
    path.unlink()


def test_disconnect_waits_for_running_copies(shm: ShmTransport) -> None:
    size = 32 << 20
    with shm.create_region("node", 0, size) as region:
        failures: list[BaseException] = []
        for round_ in range(6):
            handle = shm.connect(region.descriptor, writable=True)
            running = threading.Barrier(3)

            def work(value: int, handle: int = handle, running: threading.Barrier = running) -> None:
                local = np.full(size, value, np.uint8)
                at = np.arange(32, dtype=np.uint64) << np.uint64(20)
                batch = Batch(
                    at + np.uint64(local.ctypes.data),
                    np.full(32, handle, np.int32),
                    at,
                    np.full(32, 1 << 20, np.uint64),
                )
                running.wait()
                try:
                    for k in range(10_000):
                        local[:: 1 << 20] = k % 251
                        shm.write(batch, threads=value % 2 + 1)
                except NotConnectedError:
                    return
                except BaseException as error:  # noqa: BLE001 - reported by the test
                    failures.append(error)

            threads = [threading.Thread(target=work, args=(round_ + k,)) for k in (1, 2)]
            for thread in threads:
                thread.start()
            running.wait()
            shm.disconnect(handle)
            after = digest(region.buffer)
            for thread in threads:
                thread.join()
            assert not failures
            assert digest(region.buffer) == after, "nothing is written once disconnect has returned"


def test_two_processes_share_a_region(shm: ShmTransport, directory: Path, script: Script) -> None:
    with shm.create_region("node", 3, 1 << 20) as region:
        region.buffer[:] = random_bytes(1 << 20)
        peer = script(
            """
import sys
import numpy as np
from transport import Batch, ShmTransport, digest
with ShmTransport(sys.argv[1]) as shm:
    handle = shm.connect(bytes.fromhex(sys.argv[2]), writable=True)
    local = np.zeros(1 << 20, np.uint8)
    def batch(offset, length):
        return Batch(*(np.array([v], t) for v, t in (
            (local.ctypes.data, np.uint64), (handle, np.int32), (offset, np.uint64), (length, np.uint64))))
    shm.read(batch(0, 1 << 20))
    print(digest(local), flush=True)
    local[:] = 77
    shm.write(batch(4096, 1000))
    print("written", flush=True)
""",
            directory,
            region.descriptor.hex(),
        )
        before = region.buffer.copy()
        out, _ = peer.communicate()
        assert out.split() == [str(digest(before)), "written"]
        before[4096:5096] = 77
        assert np.array_equal(region.buffer, before)


def test_bytes_of_a_killed_owner_stay_readable_until_disconnect(
    shm: ShmTransport, directory: Path, script: Script
) -> None:
    owner = script(
        """
import sys
from transport import ShmTransport
region = ShmTransport(sys.argv[1]).create_region("node", 0, 1 << 20)
region.buffer[:] = 42
print(region.descriptor.hex(), flush=True)
sys.stdin.read()
""",
        directory,
    )
    assert owner.stdout is not None
    descriptor = bytes.fromhex(owner.stdout.readline())
    handle = shm.connect(descriptor, writable=True)
    owner.kill()
    owner.wait()
    assert shm.sweep() == ["memfabric.node.0"]
    into = np.zeros(1 << 20, np.uint8)
    assert shm.read(one(into, handle)) == 1
    assert (into == 42).all()
    with pytest.raises(UnreachableError):
        shm.connect(descriptor, writable=True)


def test_forked_child_uses_its_own_threads(shm: ShmTransport) -> None:
    size = 16 << 20
    with shm.create_region("node", 0, size) as region:
        region.buffer[:] = random_bytes(size)
        handle = shm.connect(region.descriptor, writable=True)
        want = digest(region.buffer)
        at = np.arange(16, dtype=np.uint64) << np.uint64(20)

        def check() -> bool:
            local = np.zeros(size, np.uint8)
            batch = Batch(
                at + np.uint64(local.ctypes.data), np.full(16, handle, np.int32), at, np.full(16, 1 << 20, np.uint64)
            )
            return shm.read(batch, threads=3) == 16 and digest(local) == want

        assert check()  # starts the pool
        stop = threading.Event()

        def busy() -> None:
            while not stop.is_set():
                check()

        other = threading.Thread(target=busy)
        other.start()
        try:
            for _ in range(8):
                child = os.fork()
                if child == 0:
                    code = 1
                    try:
                        good = check() and check()
                        shm.disconnect(handle)  # the parent's running copies must not count here
                        code = 0 if good else 2
                    finally:
                        os._exit(code)
                assert os.waitpid(child, 0)[1] == 0
        finally:
            stop.set()
            other.join()
        assert check()


def test_permissions_of_the_file_decide(directory: Path, script: Script) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    with ShmTransport(directory) as shm, shm.create_region("node", 0, 4096, mode=0o644) as region:
        directory.chmod(0o755)
        peer = script(
            """
import os, sys
from transport import ShmTransport
shm = ShmTransport(sys.argv[1])
shm.connect(bytes.fromhex(sys.argv[2]), writable=True)  # loads all modules, which nobody may not be able to
os.setuid(65534)
shm.connect(bytes.fromhex(sys.argv[2]), writable=False)
try:
    shm.connect(bytes.fromhex(sys.argv[2]), writable=True)
except Exception as error:
    print(type(error).__name__)
""",
            directory,
            region.descriptor.hex(),
        )
        assert peer.communicate()[0].split() == ["NotWritableError"]
