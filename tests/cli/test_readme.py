"""The examples in README and the guide, as they stand there, on a pool that `memfabric up` started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import PATIENCE_S, Up

ROOT = Path(__file__).parents[2]


@pytest.mark.processes
@pytest.mark.parametrize(("page", "printed"), [("README.md", "10"), ("docs/python.md", "")])
def test_the_examples_run(start_up: Callable[..., Up], page: str, printed: str) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert examples
    pool = start_up().wait_ready()
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(examples)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
        env={**os.environ, "MEMFABRIC_ADDRESS": pool.address, "MEMFABRIC_SHM_DIRECTORY": str(pool.directory)},
    )
    assert (out.stdout.strip(), out.stderr, out.returncode) == (printed, "", 0)
    assert pool.stop() == 0
