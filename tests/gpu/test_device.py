"""What has to hold on a device: the kernel, and batches from and to its memory; `make test-gpu` where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.client.pool import ThreadPool
from tests.gpu.conftest import Lab, random_bytes
from transport import ShmTransport, digest
from transport.base import DONE, Batch
from transport.errors import UnsupportedError
from transport.gpu import Stager, open_device, parts
from transport.gpu.plan import MovePlan, finish, make_plan

SIZES = [1, 7, 8, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025, 4032, 4095, 4096, 4097, 8192, 70_000]


def run(lab: Lab, plan: MovePlan) -> Any:
    """Run a plan on the device; its sums."""
    at = lab.upload(plan.words.view(np.uint8))
    stream = lab.device.stream()
    stream.move(at, plan)
    stream.wait()
    return lab.download(at + plan.sums_offset, 8 * len(plan.groups)).view(np.uint64)


@pytest.mark.parametrize("skew", [0, 1, 4, 8])
def test_digests_of_all_sizes(lab: Lab, skew: int) -> None:
    data = random_bytes(max(SIZES))
    at = np.full(len(SIZES), lab.upload(data, skew), np.uint64)
    length = np.array(SIZES, np.uint64)
    plan = make_plan(at, np.zeros(len(SIZES), np.uint64), length, np.arange(len(SIZES), dtype=np.int32))
    assert finish(run(lab, plan), length).tolist() == [digest(data[:size]) for size in SIZES]


@pytest.mark.parametrize("unit", [1, 4, 16, 64])
@pytest.mark.parametrize("seed", range(3))
def test_gather_with_digests(lab: Lab, unit: int, seed: int) -> None:
    """Fragments of one block scattered over an engine's pages, to where they lie side by side."""
    draw = np.random.default_rng(seed)
    n = 2000
    length = (draw.integers(1, 64, n) * unit).astype(np.uint64)
    group = np.sort(draw.integers(0, 50, n)).astype(np.int32)
    group[draw.random(n) < 0.05] = -1
    source = random_bytes(int(length.sum()) + 8 * n * unit, seed)
    start = np.zeros(n, np.uint64)
    order = draw.permutation(n)
    start[order] = np.cumsum(length[order]) - length[order] + np.arange(n, dtype=np.uint64) * np.uint64(8 * unit)
    end = np.cumsum(length)
    target = lab.upload(np.zeros(int(end[-1]), np.uint8))
    plan = make_plan(start + np.uint64(lab.upload(source)), end - length + np.uint64(target), length, group)
    sums = run(lab, plan)
    parts_of = [source[int(s) : int(s + k)] for s, k in zip(start, length, strict=True)]
    assert np.array_equal(lab.download(target, int(end[-1])), np.concatenate(parts_of))
    total = np.array([length[group == g].sum() for g in plan.groups], np.uint64)
    expected = [
        digest(b"".join(p.tobytes() for p, k in zip(parts_of, group, strict=True) if k == g)) for g in plan.groups
    ]
    assert finish(sums, total).tolist() == expected


@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
@pytest.mark.parametrize("fragment", [100, 256, 4096, 100_000])
def test_staged_batches(lab: Lab, directory: Path, write: bool, fragment: int) -> None:
    """More than fits the staging memory, scattered; twice, so that staging memory is used again."""
    size = 3 << 20
    n = size // fragment
    memory = random_bytes(size, 1)
    at = lab.upload(memory)
    with ShmTransport(directory) as shm, shm.create_region("r", 0, size) as region:
        region.buffer[:] = random_bytes(size, 2)
        handle = shm.connect(region.descriptor, writable=True)
        stager = Stager(shm, lab.device, part_bytes=parts.MIN_PART_BYTES)
        for seed in range(2):
            order = np.random.default_rng(seed).permutation(n).astype(np.uint64)
            batch = Batch(
                order * np.uint64(fragment) + np.uint64(at),
                np.full(n, handle, np.int32),
                np.arange(n, dtype=np.uint64) * np.uint64(fragment),
                np.full(n, fragment, np.uint64),
                (np.arange(n) // 7).astype(np.int32),
                np.zeros(n // 7 + 1, np.uint64),
                kind="cuda",
            )
            assert (stager.write if write else stager.read)(batch) == n and (batch.status == DONE).all()
            whole = memory[: n * fragment].reshape(n, fragment)
            stored = region.buffer[: n * fragment].reshape(n, fragment)
            if write:
                assert np.array_equal(stored, whole[order])
            else:
                whole[order] = stored
                assert np.array_equal(lab.download(at, size), memory)
            assert batch.digest is not None
            assert batch.digest.tolist() == [digest(stored[7 * g : 7 * g + 7].tobytes()) for g in range(n // 7 + 1)]
        stager.close()


# --- with the libraries that engines use ---


@pytest.fixture(params=["cupy", "torch"])
def tensors(request: pytest.FixtureRequest) -> Any:
    """(array on the GPU from bytes, bytes from an array on the GPU)."""
    try:
        open_device(0)
    except UnsupportedError as error:
        pytest.skip(str(error))
    library = pytest.importorskip(request.param)
    if request.param == "cupy":
        return library.asarray, library.asnumpy
    if not library.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return lambda data: library.from_numpy(data).cuda(), lambda tensor: tensor.cpu().numpy()


@pytest.mark.gpu
def test_put_and_get(tensors: Any, directory: Path) -> None:
    """Through a pool, on streams of the caller's own, work of which is still under way when the call begins."""
    from memfabric import NamespaceSpec, PagedBlocks, PagedLayout

    upload, download = tensors
    spec = NamespaceSpec(name="gpu", block_bytes=64 << 10, block_tokens=16, segments=4)
    pool = ThreadPool(directory)
    try:
        pool.add_node("n0")
        with pool.connect("gpu", create=spec) as client:
            data = random_bytes(16 * spec.block_bytes).reshape(16, -1)
            keys = client.block_keys(np.arange(16 * 16))
            tensor = upload(data ^ 0xFF)
            tensor ^= 0xFF  # under way when `put` begins
            assert client.put(keys, tensor).ok
            out = upload(np.zeros_like(data))
            assert client.get(keys, out).ok
            assert np.array_equal(download(out), data)
            assert np.array_equal(np.asarray(client.get(keys).out), data)
            pages = upload(np.zeros((32, spec.block_bytes), np.uint8))
            segment = spec.block_bytes // 4
            layout = PagedLayout.from_tensors([[(pages, i * segment, spec.block_bytes, segment)] for i in range(4)])
            ids = np.random.default_rng(0).permutation(32)[:16]
            assert client.get(keys, PagedBlocks(layout, ids)).ok
            assert np.array_equal(download(pages)[ids], data)
            print(client.stats()["gpu_path"])
    finally:
        pool.close()
