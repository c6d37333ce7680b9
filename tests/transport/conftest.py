"""Fixtures: a private directory in shared memory that must be empty again when the test is over."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from transport import ShmTransport
from transport.base import Batch, Int32Column, UInt8Column, UInt64Column

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shm(directory: Path) -> Iterator[ShmTransport]:
    with ShmTransport(directory) as transport:
        yield transport


Script = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def script() -> Iterator[Script]:
    """Starts `python -c source args…` with pipes; whatever still runs at the end is killed by its pid."""
    started: list[subprocess.Popen[str]] = []

    def start(source: str, *args: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", source, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def u64(*values: int) -> UInt64Column:
    return np.array(values, np.uint64)


def i32(*values: int) -> Int32Column:
    return np.array(values, np.int32)


def random_bytes(count: int, seed: int = 0) -> UInt8Column:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def one(local: UInt8Column, handle: int, offset: int = 0, *, digest: bool = False) -> Batch:
    """A batch of one operation between all of `local` and the region."""
    return Batch(
        u64(local.ctypes.data),
        i32(handle),
        u64(offset),
        u64(local.size),
        i32(0) if digest else None,
        u64(0) if digest else None,
    )
