"""The demonstration's processes: what they say when something goes wrong, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memfabric.demo import DemoError, DemoOptions, messages
from memfabric.demo.children import run_pool, run_worker
from memfabric.demo.model import cache_directory, ready_model
from memfabric.units import MIB

pytestmark = pytest.mark.processes


def ignore(event: messages.Event) -> None:
    del event


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process ends within a time (a zombie has ended)."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def small_pool(directory: Path) -> DemoOptions:
    return DemoOptions(node_bytes=8 * MIB, region_bytes=4 * MIB, shm_directory=directory, step_timeout_s=30)


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    """A directory for the regions; an ordinary one will do."""
    directory = tmp_path / "shm"
    directory.mkdir()
    return directory


def test_a_pool_lives_as_long_as_its_context(shm: Path) -> None:
    with run_pool(small_pool(shm)) as pool:
        assert pool.address.startswith("tcp://127.0.0.1:")
        assert len(pool.pids) == 3
        pool.check()
        assert list(shm.iterdir())
    assert all(gone(pid) for pid in pool.pids.values())
    assert not list(shm.iterdir())


def test_an_error_inside_ends_the_pool(shm: Path) -> None:
    with pytest.raises(KeyboardInterrupt), run_pool(small_pool(shm)) as pool:
        raise KeyboardInterrupt
    assert all(gone(pid) for pid in pool.pids.values())
    assert not list(shm.iterdir())


def test_a_pool_that_cannot_start_says_why(tmp_path: Path) -> None:
    told = pytest.raises(DemoError, match=r"the pool did not start \(exit code \d+\):\n.*missing")
    with told, run_pool(small_pool(tmp_path / "missing")):
        pass


def test_a_pool_ends_with_a_demo_that_is_killed(shm: Path, tmp_path: Path) -> None:
    note = tmp_path / "pids"
    code = (
        "import sys, time; from pathlib import Path\n"
        "from memfabric.demo import DemoOptions; from memfabric.demo.children import run_pool\n"
        "options = DemoOptions(node_bytes=8 << 20, region_bytes=4 << 20, shm_directory=Path(sys.argv[1]))\n"
        "with run_pool(options) as pool:\n"
        "    text = ' '.join(str(pid) for pid in pool.pids.values())\n"
        "    Path(sys.argv[2] + '.part').write_text(text); Path(sys.argv[2] + '.part').rename(sys.argv[2])\n"
        "    time.sleep(60)\n"
    )
    demo = subprocess.Popen([sys.executable, "-c", code, str(shm), str(note)])
    try:
        deadline_s = time.monotonic() + 30
        while not note.exists():
            assert demo.poll() is None, "the pool did not come up"
            assert time.monotonic() < deadline_s, "the pool did not come up in time"
            time.sleep(0.05)
        pids = [int(pid) for pid in note.read_text().split()]
    finally:
        demo.kill()
        demo.wait()
    assert all(gone(pid) for pid in pids)
    assert not list(shm.iterdir())


def test_a_job_that_fails_is_told_in_its_words(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a directory")
    with pytest.raises(DemoError, match=r"the conversion: .*file"):
        run_worker("the conversion", messages.Convert(cache=str(occupied)), 60, ignore)


def test_a_worker_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """The lock of the cache is held here, so that the worker waits for it."""
    import fcntl

    with pytest.raises(DemoError, match="took longer than 1 s"):
        cache = tmp_path / "cache"
        cache.mkdir()
        from memfabric.demo import model

        with (cache / f"{model._DIRECTORY}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            run_worker("the conversion", messages.Convert(cache=str(cache)), 1, ignore)


def test_a_worker_that_is_killed_is_told(tmp_path: Path) -> None:
    import fcntl

    from memfabric.demo import model

    def kill(event: messages.Event) -> None:
        assert isinstance(event, messages.Status)
        assert "waiting for another demo" in event.text
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for pid in children:
            if b"memfabric.demo.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)

    cache = tmp_path / "cache"
    cache.mkdir()
    with (cache / f"{model._DIRECTORY}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DemoError, match="was killed by SIGKILL"):
            run_worker("the conversion", messages.Convert(cache=str(cache)), 60, kill)


def test_where_the_model_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MEMFABRIC_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory(None) == tmp_path / "home/.cache/memfabric"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory(None) == tmp_path / "xdg/memfabric"
    monkeypatch.setenv("MEMFABRIC_CACHE", str(tmp_path / "own"))
    assert cache_directory(None) == tmp_path / "own"
    assert cache_directory(tmp_path / "option") == tmp_path / "option"
    assert ready_model(tmp_path) is None
