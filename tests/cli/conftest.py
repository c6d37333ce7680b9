"""Real pools for the tests of the command line: free ports, own directories, and nothing left behind."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from memfabric.cli import cli

PATIENCE_S = 120.0
"""How long tests wait for what must happen; only a hang gets there."""

MIB = 1 << 20


def memfabric(*arguments: str) -> list[str]:
    """A command line for a process of its own."""
    return [sys.executable, "-m", "memfabric", *arguments]


def run_cli(*arguments: str, input: bytes | str | None = None) -> Result:
    """Run a command in this process."""
    # click before 8.2 mixes the streams unless told; later ones keep them apart and do not know the option
    old = "mix_stderr" in inspect.signature(CliRunner).parameters
    runner: CliRunner = CliRunner(**({"mix_stderr": False} if old else {}))
    return runner.invoke(cli, list(arguments), input=input, prog_name="memfabric")


def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"never happened: {what}")
        time.sleep(0.02)


def running(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


class Up:
    """A `memfabric up` that runs as a child of the test."""

    def __init__(self, directory: Path, work: Path, *options: str) -> None:
        self.directory = directory
        self.ready_file = work / f"ready-{time.monotonic_ns()}.json"
        arguments = ["up", "--address", "tcp://127.0.0.1:auto", "--ready-file", str(self.ready_file)]
        arguments += ["--directory", str(directory)]
        self.error_file = work / f"{self.ready_file.stem}.stderr"
        with self.error_file.open("wb") as stderr:
            self.process = subprocess.Popen(memfabric(*arguments, *options), stderr=stderr, stdout=subprocess.PIPE)
        self.address = ""
        self.pids: dict[str, int] = {}

    def wait_ready(self) -> Up:
        """Wait for the ready file."""
        eventually(lambda: self.ready_file.exists() or self.process.poll() is not None, "the pool is ready")
        assert self.ready_file.exists(), self.errors()
        document = json.loads(self.ready_file.read_text())
        self.address, self.pids = document["address"], document["pids"]
        return self

    def run(self, *arguments: str, input: bytes | str | None = None) -> Result:
        """Run a command on this pool."""
        return run_cli("--address", self.address, *arguments, input=input)

    def json(self, *arguments: str) -> object:
        """The JSON that a command prints."""
        result = self.run("--json", *arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal `up` and wait for its end; returns the exit code."""
        self.process.send_signal(number)
        return self.end()

    def end(self) -> int:
        """Wait for the end of `up`; returns the exit code."""
        code = self.process.wait(PATIENCE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def errors(self) -> str:
        """What it wrote to standard error."""
        return self.error_file.read_text()

    def kill_everything(self) -> None:
        """The end of a test that failed."""
        for pid in [self.process.pid, *self.pids.values()]:
            if running(pid):
                os.kill(pid, signal.SIGKILL)
        self.end()


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Shells start background jobs with SIGINT ignored, nohup with SIGHUP; so would all processes of the tests be."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture
def regions() -> Iterator[Path]:
    """A directory for regions in shared memory; the test fails if it leaves any there."""
    directory = Path(tempfile.mkdtemp(prefix="mfcli-", dir="/dev/shm"))
    try:
        yield directory
        assert sorted(path.name for path in directory.iterdir()) == []
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def start_up(regions: Path, tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Starts pools that are gone after the test."""
    pools: list[Up] = []

    def start(*options: str) -> Up:
        pools.append(Up(regions, tmp_path, "--memory", "32MiB", "--region", "8MiB", *options))
        return pools[-1]

    yield start
    for pool in pools:
        if pool.process.poll() is None:
            pool.kill_everything()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One pool for the tests of a module that do not harm it."""
    directory = Path(tempfile.mkdtemp(prefix="mfcli-", dir="/dev/shm"))
    made = Up(directory, tmp_path_factory.mktemp("pool"), "--memory", "64MiB", "--region", "1MiB")
    try:
        yield made.wait_ready()
        assert made.stop() == 0, made.errors()
        assert sorted(path.name for path in directory.iterdir()) == []
    finally:
        if made.process.poll() is None:
            made.kill_everything()
        shutil.rmtree(directory)
