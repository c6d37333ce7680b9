"""What tests of several folders share."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def fault_seed() -> int:
    """Seed of random schedules: MEMFABRIC_FAULT_SEED, or a new one each time. A failure prints it."""
    return int(os.environ.get("MEMFABRIC_FAULT_SEED") or time.time_ns() % 1_000_000_007)


@pytest.fixture
def fault_seconds() -> float:
    """How long a random schedule lasts: MEMFABRIC_FAULT_SECONDS."""
    return float(os.environ.get("MEMFABRIC_FAULT_SECONDS") or 15.0)


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where regions of one test live. Fails the test that leaves something."""
    path = Path(tempfile.mkdtemp(prefix="memfabric-test-", dir="/dev/shm"))
    yield path
    gc.collect()
    left = sorted(entry.name for entry in path.iterdir())
    for name in left:
        (path / name).unlink()
    path.rmdir()
    assert left == [], "shared memory was left behind"
