"""Putting from and getting to GPU memory, through a real pool.

The device is made of threads (`transport.gpu.HostDevice`); that the memory is a GPU's is what the buffers claim.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import memfabric
from memfabric import GetStatus, NamespaceSpec, PagedBlocks, PagedLayout, PutStatus, UsageError
from memfabric.client import gpu
from tests.client.conftest import BLOCK_BYTES, SPEC, blocks, tokens
from tests.client.pool import ThreadPool
from transport.gpu import HostDevice

Bytes = npt.NDArray[np.uint8]


class GpuArray:
    """What CuPy's arrays show of themselves."""

    def __init__(self, data: npt.NDArray[Any], stream: int | None = 1, ordinal: int = 0) -> None:
        self.data, self.device = data, SimpleNamespace(id=ordinal)
        self.__cuda_array_interface__ = {
            "data": (data.ctypes.data, not data.flags.writeable),
            "shape": data.shape,
            "strides": None if data.flags.c_contiguous else data.strides,
            "typestr": data.dtype.str,
            "version": 3,
            "stream": stream,
        }


class GpuTensor:
    """What the client looks at of torch's CUDA tensors."""

    def __init__(self, data: npt.NDArray[Any], device: str = "cuda:0") -> None:
        self.data, self.device, self.shape = data, device, data.shape

    def data_ptr(self) -> int:
        return int(self.data.ctypes.data)

    def element_size(self) -> int:
        return self.data.itemsize

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.data.itemsize for step in self.data.strides)

    def is_contiguous(self) -> bool:
        return bool(self.data.flags.c_contiguous)


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[HostDevice]]:
    """Two devices, whose streams dawdle now and then."""
    draw = random.Random(1)
    made = [HostDevice(lambda: time.sleep(draw.choice([0, 0, 0.002])), fill=0xA5) for _ in range(2)]
    for number, device in enumerate(made):
        device.name = f"cuda:{number}"
    monkeypatch.setattr(gpu, "open_device", made.__getitem__)
    # A stand-in for torch's streams, also where torch itself is installed.
    torch = SimpleNamespace(cuda=SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=0)))
    monkeypatch.setitem(sys.modules, "torch", torch)
    yield made
    for device in made:
        device.close()


@pytest.mark.parametrize("kind", [GpuArray, GpuTensor])
@pytest.mark.parametrize("verify", [True, False])
def test_put_and_get(pool: ThreadPool, kind: Any, verify: bool) -> None:
    with pool.connect(create=SPEC, verify=verify) as client, pool.connect() as other:
        keys, data = client.block_keys(tokens(8)), blocks(8)
        assert client.stats()["gpu_path"] == "not used yet"
        assert client.put(keys, kind(data)).ok
        out = np.zeros_like(data)
        result = client.get(keys, kind(out))
        assert result.ok and np.array_equal(out, data)
        assert result.optimistic_count == 8 and isinstance(result.out, kind)
        stats = client.stats()
        assert "cuda:0, through pinned memory" in stats["gpu_path"]
        assert stats["gpu_staged_bytes"] == 2 * 8 * BLOCK_BYTES and stats["gpu_direct_bytes"] == 0
        # Whoever reads them in its own memory verifies what the device hashed.
        assert np.array_equal(np.asarray(other.get(keys).out), data)
        assert other.get(keys, kind(out), leased=True).ok


def test_what_the_host_put_is_verified_on_the_device(client: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(3)), blocks(3)
    client.put(keys, data)
    out = np.zeros_like(data)
    assert client.get(keys, GpuArray(out)).ok and np.array_equal(out, data)


def test_corrupt_blocks_are_seen_on_the_device(pool: ThreadPool, client: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(4)), blocks(4)
    client.put(keys, GpuArray(data))
    assert _corrupt(pool, data[2, 9000:9064].tobytes()) == 1
    out = np.zeros_like(data)
    result = client.get(keys, GpuArray(out))
    assert result.status.tolist() == [GetStatus.OK, GetStatus.OK, GetStatus.CORRUPT, GetStatus.OK]
    assert np.array_equal(out[[0, 1, 3]], data[[0, 1, 3]])


def _corrupt(pool: ThreadPool, needle: bytes) -> int:
    """Flip a bit of some bytes in the regions' files."""
    hits = 0
    for path in pool.directory.iterdir():
        raw = path.read_bytes()
        at = raw.find(needle)
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes([raw[at] ^ 1]))
            hits += 1
    return hits


def test_paged_blocks(client: memfabric.Client) -> None:
    """An engine's tensors: a layer each, in pages, K and V apart: gathered and scattered on the device."""
    part = BLOCK_BYTES // 8
    layers = [np.zeros((2, 32, part), np.uint8) for _ in range(4)]
    tensors = [GpuTensor(layer) for layer in layers]
    layout = PagedLayout.from_tensors([[(t, 0, part, part), (t, 32 * part, part, part)] for t in tensors])
    assert layout.device is not None
    keys, data = client.block_keys(tokens(5)), blocks(5)
    client.put(keys, data)
    ids = [7, 3, 31, 0, 12]
    assert client.get(keys, PagedBlocks(layout, ids)).ok
    for i, page in enumerate(ids):
        found = np.concatenate([layers[s][kv, page] for s in range(4) for kv in range(2)])
        assert np.array_equal(found, data[i])
    untouched = [page for page in range(32) if page not in ids]
    assert not any(layer[:, untouched].any() for layer in layers)

    again = client.block_keys(tokens(5, seed=1))
    assert client.put(again, PagedBlocks(layout, ids[::-1])).ok
    assert np.array_equal(np.asarray(client.get(again).out), data[::-1])


def test_leases_layer_by_layer_and_lists(client: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(3)), blocks(3)
    segment = BLOCK_BYTES // 4
    with client.reserve(keys) as lease:
        for layer in range(4):
            part = np.ascontiguousarray(data[:, layer * segment : (layer + 1) * segment])
            assert lease.write(GpuArray(part), segments=slice(layer, layer + 1)) == 3
        assert lease.commit().ok
    with client.acquire(keys) as lease:
        out = np.zeros((3, segment), np.uint8)
        assert lease.read(GpuTensor(out), segments=slice(2, 3)).ok
        assert np.array_equal(out, data[:, 2 * segment : 3 * segment])
    each = [np.zeros(BLOCK_BYTES, np.uint8) for _ in range(3)]
    assert client.get(keys, [GpuArray(one) for one in each]).ok
    assert all(np.array_equal(one, block) for one, block in zip(each, data, strict=True))


async def _async(pool: ThreadPool, keys: Any, data: Bytes) -> None:
    async with await memfabric.connect_async(
        pool.address, namespace="demo", shm_directory=str(pool.directory)
    ) as client:
        out = np.zeros_like(data)
        assert (await client.put(keys, GpuArray(data))).ok
        assert (await client.get(keys, GpuArray(out))).ok
        assert np.array_equal(out, data)


def test_asyncio(pool: ThreadPool, client: memfabric.Client) -> None:
    import asyncio

    asyncio.run(_async(pool, client.block_keys(tokens(20, seed=5)), blocks(20)))


def test_only_host_memory_can_be_registered(client: memfabric.Client) -> None:
    with pytest.raises(UsageError, match="GPU memory"):
        client.register(GpuArray(np.zeros(4096, np.uint8)))


def test_threads_share_a_client(client: memfabric.Client) -> None:
    failed: list[Any] = []

    def work(seed: int) -> None:
        keys, data, out = client.block_keys(tokens(4, seed)), blocks(4, seed), np.zeros((4, BLOCK_BYTES), np.uint8)
        ok = client.put(keys, GpuArray(data)).ok and client.get(keys, GpuArray(out)).ok and np.array_equal(out, data)
        failed.extend([] if ok else [seed])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_device_that_fails_is_an_error_that_says_so(client: memfabric.Client, devices: list[HostDevice]) -> None:
    keys, data = client.block_keys(tokens(2)), blocks(2)
    client.put(keys, data)

    def broken() -> None:
        raise RuntimeError("an illegal address")

    devices[0].hook = broken
    out = np.zeros_like(data)
    result = client.get(keys, GpuArray(out))
    assert not result.ok and (result.status == GetStatus.UNREACHABLE).all() and "illegal address" in result.message
    put = client.put(client.block_keys(tokens(2, seed=9)), GpuArray(data))
    assert (put.status != PutStatus.STORED).all() and "illegal address" in put.message
    devices[0].hook = None
    assert client.get(keys, GpuArray(out)).ok and np.array_equal(out, data)


def test_what_cannot_be_used_is_refused(client: memfabric.Client, devices: list[HostDevice]) -> None:
    keys = client.block_keys(tokens(2))
    data = blocks(2)

    def refused(value: Any, text: str) -> None:
        with pytest.raises(UsageError, match=text):
            client.get(keys, value)

    refused([GpuArray(data[0]), GpuArray(data[1], ordinal=1)], "cuda:0 and cuda:1; one call")
    refused([GpuArray(data[0]), data[1]], "cuda:0 and the host")
    refused(GpuArray(data[:1]), "expected 32768")
    refused(GpuArray(np.zeros((BLOCK_BYTES, 2), np.uint8).T), "not C-contiguous")
    frozen = data.copy()
    frozen.flags.writeable = False
    refused(GpuArray(frozen), "read-only")
    refused(SimpleNamespace(__cuda_array_interface__={"data": (1, False)}), "malformed")
    masked = GpuArray(data)
    masked.__cuda_array_interface__["mask"] = object()
    refused(masked, "masked")
    refused(GpuTensor(data, "xpu:0"), "tensor on xpu:0")
    mixed = [[(GpuArray(data), 0, BLOCK_BYTES, BLOCK_BYTES // 2), (data, 0, BLOCK_BYTES, BLOCK_BYTES // 2)]]
    with pytest.raises(UsageError, match="the paged layout lies in the memory of cuda:0 and the host"):
        PagedLayout.from_tensors(mixed)


def test_streams_that_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def current(device: str) -> Any:
        return SimpleNamespace(cuda_stream={"cuda:0": 70, "cuda:1": 71}[device])

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(current_stream=current)))
    data = np.zeros(8, np.uint8)
    arrays = [GpuArray(data, 5), GpuArray(data, None), GpuArray(data, 5), GpuTensor(data), GpuTensor(data, "cuda:1")]
    assert gpu.current_streams([*arrays, b"no gpu"]) == (5, 70, 71)
    old = GpuArray(data)
    del old.__cuda_array_interface__["stream"]
    assert gpu.current_streams([old]) == (0,)


def test_more_than_fits_the_staging_memory(pool: ThreadPool) -> None:
    spec = NamespaceSpec(name="large", block_bytes=1 << 20, block_tokens=16, segments=8)
    with pool.connect("large", create=spec) as client:
        keys, data = client.block_keys(tokens(14)), blocks(14, block_bytes=1 << 20)
        put = client.put(keys, GpuArray(data))
        n = put.stored_count
        assert n >= 9, "more than two parts"
        out = np.zeros_like(data[:n])
        assert client.get(keys[:n], GpuArray(out)).ok and np.array_equal(out, data[:n])


def test_direct_where_the_transport_can(pool: ThreadPool, client: memfabric.Client, monkeypatch: Any) -> None:
    """Nothing is staged when the transport says that it takes device memory (the memory is the host's, in truth)."""
    import dataclasses

    from transport import ShmTransport, shm

    claims = dataclasses.replace(shm._CAPABILITIES, kinds=frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(shm, "_CAPABILITIES", claims)
    real = ShmTransport._run

    def run(self: Any, write: bool, batch: Any, deadline_ns: int, threads: int) -> int:
        batch.kind = "cpu"
        return real(self, write, batch, deadline_ns, threads)

    monkeypatch.setattr(ShmTransport, "_run", run)
    keys, data = client.block_keys(tokens(4)), blocks(4)
    out = np.zeros_like(data)
    assert client.put(keys, GpuArray(data)).ok
    assert client.get(keys, GpuArray(out)).ok and np.array_equal(out, data)
    stats = client.stats()
    assert stats["gpu_path"] == "cuda:0, directly" and stats["gpu_staged_bytes"] == 0
    assert stats["gpu_direct_bytes"] == 2 * 4 * BLOCK_BYTES
