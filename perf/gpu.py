"""GPU memory: the kernel against plain copies on the device, staging against copies over the bus, in one run.

`python -m perf.gpu` on a machine with a CUDA device (`make test-gpu`). `--device host` runs the same on the processor,
to see that it works; those figures say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from perf.timing import ratio, take_turns, timed
from transport import ShmTransport
from transport.base import Batch
from transport.errors import UnsupportedError
from transport.gpu import Device, HostDevice, Stager, open_device
from transport.gpu.plan import MovePlan, make_plan

FRAGMENTS = (256, 4 << 10, 64 << 10)
BLOCKS = (64 << 10, 1 << 20)
SEGMENT_BYTES = 64 << 10
LEAST_TURNS = 5


class Bench:
    """A device with two buffers on it and one pinned."""

    def __init__(self, device: Device, size_bytes: int) -> None:
        self.device, self.size_bytes = device, size_bytes
        self.source, self.target = device.allocate(size_bytes), device.allocate(size_bytes)
        self.pinned = device.pin(size_bytes)
        self.pinned.array[:] = np.random.default_rng(0).integers(0, 256, size_bytes, dtype=np.uint8)
        self.stream = device.stream()
        self._plans: list[Any] = []
        self.copy(self.source.address, self.pinned.address)

    def copy(self, target: int, source: int) -> None:
        """All of a buffer, done when this returns."""
        self.stream.copy(target, source, self.size_bytes)
        self.stream.wait()

    def launch(self, plan: MovePlan) -> Callable[[], None]:
        """A launch of a plan that lies on the device already; its sums say nothing after the first time."""
        at, pinned = self.device.allocate(plan.size_bytes), self.device.pin(plan.size_bytes)
        pinned.array[:] = plan.words.view(np.uint8)
        self.stream.copy(at.address, pinned.address, plan.size_bytes)
        self.stream.wait()
        self._plans.append((at, pinned))

        def run() -> None:
            self.stream.move(at.address, plan)
            self.stream.wait()

        return run

    def gather(self, fragment: int, hashed: bool, move: bool = True) -> MovePlan:
        """All of the source, in fragments of random order, to the target; segments of 64 KiB are hashed."""
        n = self.size_bytes // fragment
        order = np.random.default_rng(1).permutation(n).astype(np.uint64) * np.uint64(fragment)
        place = np.arange(n, dtype=np.uint64) * np.uint64(fragment)
        target = place + np.uint64(self.target.address) if move else np.zeros(n, np.uint64)
        group = (place // np.uint64(SEGMENT_BYTES)).astype(np.int32) if hashed else None
        source = order + np.uint64(self.source.address)
        return make_plan(source, target, np.full(n, fragment, np.uint64), group)

    def actions(self) -> dict[str, Callable[[], object]]:
        """What is measured on the device and over the bus; each moves `size_bytes`."""
        found: dict[str, Callable[[], object]] = {
            "copy on the device": lambda: self.copy(self.target.address, self.source.address),
            "copy to the device": lambda: self.copy(self.target.address, self.pinned.address),
            "copy from the device": lambda: self.copy(self.pinned.address, self.source.address),
            "digest": self.launch(self.gather(SEGMENT_BYTES, True, move=False)),
        }
        for fragment in FRAGMENTS:
            found[f"gather of {fragment} B"] = self.launch(self.gather(fragment, False))
            found[f"gather and digest of {fragment} B"] = self.launch(self.gather(fragment, True))
        return found


def staged(bench: Bench, shm: ShmTransport, region: Any, block: int) -> dict[str, Callable[[], object]]:
    """Blocks between device memory and a region, in random order, with a digest for each."""
    handle = shm.connect(region.descriptor, writable=True)
    stager = Stager(shm, bench.device)
    n = bench.size_bytes // block
    batch = Batch(
        np.random.default_rng(2).permutation(n).astype(np.uint64) * np.uint64(block) + np.uint64(bench.source.address),
        np.full(n, handle, np.int32),
        np.arange(n, dtype=np.uint64) * np.uint64(block),
        np.full(n, block, np.uint64),
        np.arange(n, dtype=np.int32),
        np.zeros(n, np.uint64),
        kind="cuda",
    )

    def check(done: int) -> None:
        if done != n:
            raise SystemExit(f"only {done} of {n} operations were done: {batch.error}")

    return {
        f"write of {block >> 10} KiB blocks, staged": lambda: check(stager.write(batch)),
        f"read of {block >> 10} KiB blocks, staged": lambda: check(stager.read(batch)),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="cuda:N or host")
    parser.add_argument("--mib", type=int, default=256, help="bytes that each action moves")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each of the two tables")
    chosen = parser.parse_args()
    try:
        device: Device = HostDevice() if chosen.device == "host" else open_device(int(chosen.device.partition(":")[2]))
    except UnsupportedError as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        return 1
    bench = Bench(device, chosen.mib << 20)
    print(f"{device.name}, {chosen.mib} MiB at a time; medians, and as a part of the limit (the copy named behind)")
    _table(bench, bench.actions(), chosen.seconds, {"digest": "copy on the device", "gather": "copy on the device"})
    with (
        tempfile.TemporaryDirectory(prefix="memfabric-bench-", dir="/dev/shm") as directory,
        ShmTransport(Path(directory)) as shm,
        shm.create_region("gpu", 0, bench.size_bytes) as region,
    ):
        limits = {name: each for name, each in bench.actions().items() if name.startswith(("copy to", "copy from"))}
        blocks = {name: each for block in BLOCKS for name, each in staged(bench, shm, region, block).items()}
        _table(bench, limits | blocks, chosen.seconds, {"write": "copy from the device", "read": "copy to the device"})
    device.close()
    return 0


def _table(bench: Bench, actions: dict[str, Callable[[], object]], seconds: float, limits: dict[str, str]) -> None:
    turns = {name: (lambda _, call=call: timed(call)) for name, call in actions.items()}
    samples = take_turns(turns, seconds, LEAST_TURNS, 10_000, 2)
    for name, taken in samples.items():
        rate = bench.size_bytes / float(np.median(taken))
        limit = next((limit for start, limit in limits.items() if name.startswith(start)), None)
        part = "" if limit is None else f"  {100 * ratio(samples[limit], taken)['median']:5.0f} %  ({limit})"
        print(f"  {name:36} {rate:8.2f} GB/s{part}")


if __name__ == "__main__":
    sys.exit(main())
