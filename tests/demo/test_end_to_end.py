"""The demonstration as a whole, with the real model."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfabric.demo import DemoOptions, run_demo
from memfabric.demo.run import _NEEDED
from memfabric.errors import UsageError
from memfabric.testing import hosts
from memfabric.testing.hosts import why_not
from tests.demo.test_children import gone

_MISSING = [name for name in _NEEDED if importlib.util.find_spec(name) is None]


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mf-demo-test-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.mark.demo
@pytest.mark.timeout(1200)
@pytest.mark.skipif(bool(_MISSING), reason=f"needs the demo extra: {', '.join(_MISSING)} not installed")
def test_demo(tmp_path: Path, shm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = DemoOptions(out_dir=tmp_path / "out", shm_directory=shm, repeats=1, new_tokens=24, as_json=True)
    report = run_demo(options)

    assert report.identical
    same, shared = report.requests
    whole = (same.prompt_tokens - 1) // report.block_tokens
    assert report.prefill.blocks_written == same.prompt_tokens // report.block_tokens
    assert same.blocks_read == whole, "the whole prompt is reused, but for the last tokens"
    assert same.blocks_written == 0
    assert 0 < shared.blocks_read < whole, "only the shared system prompt is reused"
    assert shared.blocks_read + shared.blocks_written == shared.prompt_tokens // report.block_tokens
    for request in report.requests:
        assert 1500 <= request.prompt_tokens <= 1900
        assert request.bytes_read == request.blocks_read * report.block_bytes
        assert request.reused_tokens == request.blocks_read * report.block_tokens < request.prompt_tokens
        assert request.tokens_cold
    assert len(set(report.pids.values())) == len(report.pids) == 3 + 3, "every role is a process of its own"

    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "out/report.json").read_text())
    assert "Decode process" in err
    assert (tmp_path / "out/demo.png").read_bytes().startswith(b"\x89PNG")
    assert all(gone(pid) for pid in report.pids.values())
    assert not list(shm.iterdir())


@pytest.mark.skipif(not _MISSING, reason="the demo extra is installed here")
def test_without_the_extra_the_error_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"memfabric\[demo\]"):
        run_demo(DemoOptions(out_dir=tmp_path))


@pytest.mark.demo
@pytest.mark.timeout(1200)
@pytest.mark.skipif(bool(_MISSING), reason=f"needs the demo extra: {', '.join(_MISSING)} not installed")
@pytest.mark.skipif(bool(why_not()), reason=f"network namespaces cannot be made here: {why_not()}")
def test_demo_on_two_hosts(tmp_path: Path, shm: Path) -> None:
    options = DemoOptions(
        out_dir=tmp_path / "out", shm_directory=shm, repeats=1, new_tokens=8, hosts=True, quiet=True, as_json=True
    )
    report = run_demo(options)
    assert report.identical
    assert report.hosts == 2
    assert "ucx" in report.transport
    assert all(request.blocks_read for request in report.requests)
    assert all(gone(pid) for pid in report.pids.values())
    assert not list(shm.iterdir())
    assert not hosts.remove_leftovers()
