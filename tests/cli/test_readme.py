"""README's example, as it stands there, on a pool that `memfabric up` started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import PATIENCE_S, Up

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.processes
def test_the_example_in_readme_runs(start_up: Callable[..., Up]) -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) == 1
    pool = start_up().wait_ready()
    out = subprocess.run(
        [sys.executable, "-c", examples[0]],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
        env={**os.environ, "MEMFABRIC_ADDRESS": pool.address, "MEMFABRIC_SHM_DIRECTORY": str(pool.directory)},
    )
    assert (out.stdout.strip(), out.returncode) == ("10", 0), out.stderr
    assert pool.stop() == 0
