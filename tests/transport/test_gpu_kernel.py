"""The CUDA kernel, compiled for the processor, against the digest of all else; and by nvcc, where it is."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import transport.gpu
from tests.transport.conftest import i32, random_bytes, u64
from transport import _gpu_host, digest
from transport.base import Int32Column, UInt64Column
from transport.gpu.plan import CHUNK_BYTES, MovePlan, finish, make_plan

SOURCE = Path(transport.gpu.__file__).with_name("move.cu")


def launch(plan: MovePlan, chunks_per_warp: int = 1) -> UInt64Column:
    """Run a plan; its sums."""
    at = plan.words.ctypes.data
    _gpu_host.move(at, plan.count, at + plan.streams_offset, at + plan.sums_offset, plan.chunks, chunks_per_warp)
    return plan.words[plan.sums_offset // 8 :]


def digests(plan: MovePlan, length: UInt64Column, group: Int32Column, chunks_per_warp: int = 1) -> dict[int, int]:
    """Run a plan of whole groups; their digests."""
    total = np.array([length[group == g].sum() for g in plan.groups], np.uint64)
    return dict(zip(plan.groups.tolist(), finish(launch(plan, chunks_per_warp), total).tolist(), strict=True))


SIZES = [*range(1, 130), *range(960, 1100), *range(4000, 4200), 8191, 8192, 8193, 12288, 20000]


@pytest.mark.parametrize("alignment", [0, 1, 2, 4, 8, 12, 13])
def test_digest_of_every_size_and_alignment(alignment: int) -> None:
    data = random_bytes(1 << 15)[alignment:]
    for size in SIZES:
        length, group = u64(size), i32(0)
        plan = make_plan(u64(data.ctypes.data), u64(0), length, group)
        assert digests(plan, length, group) == {0: digest(data[:size])}, size


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_fragments_anywhere_are_moved_and_hashed(data: st.DataObject) -> None:
    """Groups of scattered fragments of any length, to scattered places at any alignment; also ones without a digest."""
    step = data.draw(st.sampled_from([1, 1, 2, 4, 8, 16, 16, 512]), label="multiple of")
    count = data.draw(st.integers(1, 30), label="fragments")
    most = data.draw(st.sampled_from([64, 600, 9000]), label="most")
    size = [max(1, data.draw(st.integers(1, most // step or 1)) * step) for _ in range(count)]
    skew = 0 if step >= 16 else data.draw(st.integers(0, 15), label="skew")
    source = random_bytes(sum(size) + 64, count)
    room = np.zeros(sum(size) + 3 * step * count + 64, np.uint8)
    base = -room.ctypes.data % 16 + skew
    order = data.draw(st.permutations(range(count)), label="order at the target")
    target, at = [0] * count, base
    for which in order:
        target[which] = at
        at += size[which] + data.draw(st.integers(0, 3)) * step
    start = np.cumsum([0, *size[:-1]]) + (-source.ctypes.data % 16)
    group = np.array(sorted(data.draw(st.integers(0, 4)) for _ in range(count)), np.int32)
    group[[data.draw(st.integers(0, 5)) == 0 for _ in range(count)]] = -1
    hash_only = [data.draw(st.integers(0, 7)) == 0 for _ in range(count)]
    length = np.array(size, np.uint64)
    to = np.array([0 if skip else room.ctypes.data + t for skip, t in zip(hash_only, target, strict=True)], np.uint64)
    plan = make_plan(source.ctypes.data + start.astype(np.uint64), to, length, group)
    found = digests(plan, length, group, data.draw(st.sampled_from([1, 2, 3, 100])))

    expected = np.zeros_like(room)
    for t, s, n, skip in zip(target, start, size, hash_only, strict=True):
        if not skip:
            expected[t : t + n] = source[s : s + n]
    assert np.array_equal(room, expected), "moved bytes, and nothing else"
    assert set(found) == set(group[group >= 0].tolist())
    for g, value in found.items():
        parts = [source[s : s + n].tobytes() for s, n, k in zip(start, size, group, strict=True) if k == g]
        assert value == digest(b"".join(parts))


@given(
    size=st.integers(1, 40000),
    cuts=st.lists(st.integers(0, 9), max_size=4),
    chunks_per_warp=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_a_group_over_several_launches(size: int, cuts: list[int], chunks_per_warp: int) -> None:
    data = random_bytes(size, size)
    edges = sorted({0, size, *(cut * CHUNK_BYTES for cut in cuts if cut * CHUNK_BYTES < size)})
    total = np.zeros(1, np.uint64)
    for begin, end in itertools.pairwise(edges):
        plan = make_plan(u64(data.ctypes.data + begin), u64(0), u64(end - begin), i32(7), u64(begin))
        assert plan.groups.tolist() == [7]
        total += launch(plan, chunks_per_warp)
    assert finish(total, u64(size)).tolist() == [digest(data)]


def test_the_empty_stream() -> None:
    assert finish(u64(0), u64(0)).tolist() == [digest(b"")]
    plan = make_plan(u64(), u64(), u64())
    assert (plan.count, plan.stream_count, plan.chunks, plan.size_bytes) == (0, 0, 0, 0)
    launch(plan)


def test_without_groups_nothing_is_hashed_and_streams_are_packed() -> None:
    source, target = random_bytes(5000), np.zeros(5000, np.uint8)
    at = np.arange(50, dtype=np.uint64) * np.uint64(100)
    plan = make_plan(
        at + np.uint64(source.ctypes.data), at + np.uint64(target.ctypes.data), np.full(50, 100, np.uint64)
    )
    assert (plan.stream_count, plan.chunks, len(plan.groups)) == (1, 2, 0)
    launch(plan)
    assert np.array_equal(source, target)


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="range 1 is empty"):
        make_plan(u64(1, 1), u64(0, 0), u64(5, 0))
    with pytest.raises(ValueError, match="multiples of 4096"):
        make_plan(u64(1), u64(0), u64(5), i32(0), u64(100))
    with pytest.raises(ValueError, match="without operations"):
        _gpu_host.move(0, 0, 0, 0, 1, 1)


@pytest.fixture(scope="module")
def device_branch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[MovePlan, int], UInt64Column]:
    """The source's device branch, run by the processor with the 32 lanes of a warp as threads of their own."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    directory = tmp_path_factory.mktemp("simt")
    text = SOURCE.read_text("utf-8")
    for name, kind in (("u64", "u64"), ("u32", "u32"), ("u16", "u16"), ("u8", "u8")):  # what only a GPU can assemble
        text = re.sub(rf'asm volatile\("ld\.global\.{name} .*\);', f"value = simt::load<{kind}>(from);", text)
    wide = 'unit = Unit{simt::load<u64>(from), simt::load<u64>(from + 8)}; if ((u64)from % 16) simt::fail("load16");'
    text = re.sub(r'asm volatile\("ld\.global\.v2\.u64 .*\);', wide, text)
    assert "asm" not in text
    text = f'''#include "{Path(__file__).with_name("simt.hpp")}"
{text}
extern "C" void launch(unsigned blocks, const mf_gpu::Operation* operations, mf_gpu::u64 count,
                       const mf_gpu::Stream* streams, mf_gpu::u64* sums, mf_gpu::u64 chunks, mf_gpu::u64 run) {{
    blockDim.x = 256;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (unsigned thread = 0; thread < 256; thread += 32)
            simt::run(thread, [=] {{ memfabric_move(operations, count, streams, sums, chunks, run); }});
}}'''
    source, library = directory / "simt.cpp", directory / "simt.so"
    source.write_text(text, "utf-8")
    command = [compiler, "-std=c++17", "-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    done = subprocess.run([*command, "-o", library, source], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))

    def run(plan: MovePlan, chunks_per_warp: int) -> UInt64Column:
        at = plan.words.ctypes.data
        warps = -(-plan.chunks // chunks_per_warp)
        numbers = (at, plan.count, at + plan.streams_offset, at + plan.sums_offset, plan.chunks, chunks_per_warp)
        loaded.launch(ctypes.c_uint(-(-warps // 8)), *map(ctypes.c_uint64, numbers))
        return plan.words[plan.sums_offset // 8 :]

    return run


@pytest.mark.parametrize("unit", [1, 4, 16, 512])
def test_the_device_branch_lane_by_lane(device_branch: Callable[[MovePlan, int], UInt64Column], unit: int) -> None:
    """What a GPU executes, but for the loads' instructions: the same bytes and sums as the branch for processors."""
    draw = np.random.default_rng(unit)
    for seed in range(6):
        n = 60
        length = (draw.integers(1, 9000 // unit // (1 + seed % 3) + 2, n) * unit).astype(np.uint64)
        group = np.sort(draw.integers(0, 20, n)).astype(np.int32)
        group[draw.random(n) < 0.1] = -1
        gaps = draw.integers(0, 5, n).astype(np.uint64) * np.uint64(unit)
        start = np.cumsum(length + gaps) - length
        source = random_bytes(int(start[-1] + length[-1]) + 512, seed)
        source = source[-source.ctypes.data % 256 :]
        order = draw.permutation(n)
        place = np.empty(n, np.uint64)
        place[order] = np.cumsum(length[order]) - length[order]
        found = []
        for run in (device_branch, launch):
            target = np.zeros(int(length.sum()) + 256, np.uint8)
            target = target[-target.ctypes.data % 256 :][: int(length.sum())]
            to = place + np.uint64(target.ctypes.data)
            plan = make_plan(start + np.uint64(source.ctypes.data), to, length, group)
            found.append((run(plan, 1 + seed % 3).copy(), target))
        assert np.array_equal(found[0][0], found[1][0])
        assert np.array_equal(found[0][1], found[1][1]) and found[0][1].any()


def test_nvrtc_compiles_it() -> None:
    """As CuPy does, without CuPy and without a device."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    found = [each for place in places for each in place.glob("cuda_nvrtc/lib/libnvrtc.so.*")]
    if not found:
        pytest.skip("no NVRTC in this environment (nvidia-cuda-nvrtc-cu12)")
    library = ctypes.CDLL(str(found[0]))
    program, source = ctypes.c_void_p(), SOURCE.read_bytes()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"move.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 2)(b"-std=c++17", b"-arch=sm_90")
    code = library.nvrtcCompileProgram(program, 2, options)
    log = ctypes.create_string_buffer(1 << 16)
    library.nvrtcGetProgramLog(program, log)
    assert code == 0, log.value.decode()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_it_without_spills(architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    output = tmp_path / "move.cubin"
    command = [nvcc, "-std=c++17", "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "-o", output, SOURCE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    told = done.stdout + done.stderr
    if done.returncode != 0 and "nsupported gpu architecture" in told:
        pytest.skip(f"this nvcc doesn't know {architecture}")
    assert done.returncode == 0, told
    assert output.stat().st_size > 0
    assert "memfabric_move" in told and "0 bytes spill stores, 0 bytes spill loads" in told
    assert "0 bytes stack frame" in told, "the units of a lane must stay in registers"
