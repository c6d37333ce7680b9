"""What tests of several folders share."""

from __future__ import annotations

import os
import time

import pytest


@pytest.fixture
def fault_seed() -> int:
    """Seed of random schedules: MEMFABRIC_FAULT_SEED, or a new one each time. A failure prints it."""
    return int(os.environ.get("MEMFABRIC_FAULT_SEED") or time.time_ns() % 1_000_000_007)


@pytest.fixture
def fault_seconds() -> float:
    """How long a random schedule lasts: MEMFABRIC_FAULT_SECONDS."""
    return float(os.environ.get("MEMFABRIC_FAULT_SECONDS") or 15.0)
