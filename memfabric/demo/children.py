"""The demonstration's processes: a pool and workers, each started, listened to and ended.

Responsible for their life only. They are detached from the terminal, so that Ctrl-C reaches only the
demonstration, which then ends them; and they end with it when it is killed. Invariant: a context that was left has
no process running.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec

from memfabric.demo import messages
from memfabric.demo.report import DemoError, DemoOptions
from memfabric.testing.hosts import Host

HOSTS_TRANSPORT = "ucx"
"""Between hosts. Theirs share this machine's memory, so it must be said."""
_STOP_S = 10.0
_TAIL_LINES = 12
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # everything is on disk: no look-ups
    "TRANSFORMERS_VERBOSITY": "error",
}


class Pool:
    """A running pool. `address` to connect to; `pids` of its processes by name."""

    def __init__(self, address: str, pids: dict[str, int], process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        self.address = address
        self.pids = pids
        self._process = process
        self._log = log

    def check(self) -> None:
        """Raise `DemoError` if it has ended."""
        if self._process.poll() is not None:
            raise DemoError(f"the pool ended unexpectedly:\n{_tail(self._log)}")


@contextlib.contextmanager
def run_pool(options: DemoOptions, host: Host | None = None) -> Iterator[Pool]:
    """A metadata server and memory nodes for as long as the context lasts, on `host` if there are several.

    Raises:
        DemoError: it did not come up (no room in shared memory, say), or did not end cleanly.
    """
    with tempfile.TemporaryDirectory(prefix="memfabric-demo-") as folder, tempfile.TemporaryFile() as log:
        ready = Path(folder) / "ready.json"
        address = "127.0.0.1" if host is None else host.address
        arguments = ["up", "--address", f"tcp://{address}:auto", "--nodes", str(options.node_count)]
        if host is not None:  # a network of its own that nobody else is on
            arguments += ["--insecure", "--transport", HOSTS_TRANSPORT]
        arguments += ["--memory", str(options.node_bytes), "--region", str(options.region_bytes)]
        arguments += ["--ready-file", str(ready)]
        if options.shm_directory is not None:
            arguments += ["--directory", str(options.shm_directory)]
        with _on(host):
            process = _start(arguments, stdout=log, stderr=log)
        try:
            deadline_s = time.monotonic() + options.step_timeout_s
            while not ready.exists():
                if process.poll() is not None:
                    raise DemoError(f"the pool did not start (exit code {process.returncode}):\n{_tail(log)}")
                if time.monotonic() > deadline_s:
                    raise DemoError(f"the pool was not ready within {options.step_timeout_s:.0f} s:\n{_tail(log)}")
                time.sleep(0.02)
            found = json.loads(ready.read_text())
            yield Pool(found["address"], found["pids"], process, log)
        except BaseException:
            _end(process)
            raise
        status = _end(process)
        if status:
            raise DemoError(f"the pool did not end cleanly (exit code {status}):\n{_tail(log)}")


def run_worker(
    name: str,
    job: messages.Job,
    timeout_s: float,
    on_event: Callable[[messages.Event], None],
    host: Host | None = None,
) -> tuple[int, list[messages.Event]]:
    """Run a job in a process of its own; its process id and its events but for statuses.

    Args:
        name: what people call it, for errors.
        timeout_s: how long it may take.
        on_event: gets every event as it comes.
        host: where it runs, if there are several.

    Raises:
        DemoError: it failed, died, or took too long; says what it wrote last.
    """
    with tempfile.TemporaryFile() as log:
        with _on(host):
            process = _start([msgspec.json.encode(job).decode()], stdout=subprocess.PIPE, stderr=log)
        try:
            events: list[messages.Event] = []
            for line in _lines(process, timeout_s, name):
                event = msgspec.json.decode(line, type=messages.Event)
                on_event(event)
                if isinstance(event, messages.Failed):
                    raise DemoError(f"{name}: {event.message}")
                if not isinstance(event, messages.Status):
                    events.append(event)
            status = process.wait(timeout=_STOP_S)
            if status:
                raise DemoError(f"{name} {_how(status)}:\n{_tail(log)}")
            return process.pid, events
        except msgspec.DecodeError as error:
            raise DemoError(f"{name} wrote what is not an event: {error}\n{_tail(log)}") from error
        except subprocess.TimeoutExpired as error:
            raise DemoError(f"{name} closed its output but did not end:\n{_tail(log)}") from error
        finally:
            _end(process)


def _on(host: Host | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if host is None else host.inside()


def _start(arguments: Sequence[str], *, stdout: IO[bytes] | int, stderr: IO[bytes] | int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "memfabric.demo.worker", str(os.getpid()), *arguments]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,
        )
    except OSError as error:
        raise DemoError(f"cannot start a process: {error}") from error


def _lines(process: subprocess.Popen[bytes], timeout_s: float, name: str) -> Iterator[bytes]:
    """Lines of a process's output until it closes it."""
    assert process.stdout is not None
    deadline_s = time.monotonic() + timeout_s
    rest = b""
    with process.stdout, selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline_s - time.monotonic())):
                raise DemoError(f"{name} took longer than {timeout_s:.0f} s")
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from lines


def _end(process: subprocess.Popen[bytes]) -> int:
    """Ask a process to end, and make it; its exit code."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with exit code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-status}"


def _tail(log: IO[bytes]) -> str:
    size = os.fstat(log.fileno()).st_size
    data = os.pread(log.fileno(), size, 0)  # not seek: the process that writes shares the position
    lines = data.decode(errors="replace").strip().splitlines()
    return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:]) or "  (it wrote nothing)"
