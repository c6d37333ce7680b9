"""Child processes of one parent: start, listen, stop, and never leave one behind.

Responsible for the life of processes: it starts them detached from the terminal (so that Ctrl-C reaches
only the parent, which then stops them in its own order), hears what they report, what they log and how
they end, and turns signals of the parent into events of the same loop. It must not know what the
processes do.

A child reports over a pipe whose number it gets with ``--report-fd``: one JSON object a line. A child ends
with its parent, even when that is killed: it asks the kernel for SIGTERM at the parent's death
(`die_with_parent`) and gives up at once when the parent is gone already.

Invariant: when the `Supervisor` context is left, none of its children runs.
Linux only (``PR_SET_PDEATHSIG``); must be used from the main thread (signal handlers).
"""

from __future__ import annotations

import collections
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

from memfabric.errors import UnavailableError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_LINE_LIMIT_BYTES = 1 << 20
_TAIL_LINES = 40
_PIPE_READ_BYTES = 1 << 16
_PIPE_READS = 32
"""Together more than a pipe can hold (1 MiB at most without privileges, pipe(7))."""


@dataclass(frozen=True)
class Reported:
    """A child reported something about itself."""

    child: Child
    report: dict[str, Any]


@dataclass(frozen=True)
class Logged:
    """A child wrote a line to its standard output or error."""

    child: Child
    line: str


@dataclass(frozen=True)
class Exited:
    """A child ended. `status` as in `subprocess`: negative for the signal that killed it."""

    child: Child
    status: int


@dataclass(frozen=True)
class Signalled:
    """The parent was asked to stop."""

    signal: signal.Signals


Event = Reported | Logged | Exited | Signalled


@dataclass(eq=False)
class Child:
    """A process that was started.

    Attributes:
        name: what people call it; unique within a supervisor.
        status: None while it runs, then as in `Exited`.
        tail: its last lines, for saying why it ended.
    """

    name: str
    process: subprocess.Popen[bytes]
    status: int | None = None
    tail: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=_TAIL_LINES))

    @property
    def pid(self) -> int:
        """Process id, also after its end."""
        return self.process.pid

    def describe_end(self) -> str:
        """How it ended, in words: ``exit code 1`` or ``killed by SIGKILL``."""
        if self.status is None:
            return "still running"
        if self.status >= 0:
            return f"exit code {self.status}"
        try:
            return f"killed by {signal.Signals(-self.status).name}"
        except ValueError:  # a real-time signal has no name
            return f"killed by signal {-self.status}"


class _Lines:
    """Cuts the bytes of a pipe into lines; a line that never ends is cut at a limit."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._rest = b""

    def read(self) -> tuple[list[bytes], bool]:
        """Whole lines that are there now, and whether the pipe is at its end.

        One call empties the pipe of a writer that has ended; a writer that goes on gets its next turn later.
        """
        found: list[bytes] = []
        for _ in range(_PIPE_READS):
            try:
                data = os.read(self.fd, _PIPE_READ_BYTES)
            except BlockingIOError:
                return found, False
            if not data:
                return found + ([self._rest] if self._rest else []), True
            *lines, self._rest = (self._rest + data).split(b"\n")
            found += lines
            if len(self._rest) > _LINE_LIMIT_BYTES:
                found.append(self._rest)
                self._rest = b""
        return found, False


class Supervisor:
    """Starts processes and tells in one loop what happens to them; a context manager.

    While the context is open, SIGINT, SIGTERM and SIGHUP (unless it is ignored) are events instead of the
    parent's end.
    """

    def __init__(self) -> None:
        self.children: list[Child] = []
        self._selector = selectors.DefaultSelector()
        self._handlers: dict[int, Any] = {}
        self._signals: collections.deque[signal.Signals] = collections.deque()
        self._wake_read, self._wake_write = -1, -1
        self._old_wakeup = -1

    def __enter__(self) -> Supervisor:
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._handlers[number] = signal.signal(number, self._on_signal)
        # without a handler the default action of SIGCHLD never reaches the wake-up pipe
        self._handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._old_wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self.running():
            child.process.kill()
        for child in self.running():
            child.status = child.process.wait()
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        os.close(self._wake_write)
        self._selector.close()

    def start(self, name: str, arguments: Sequence[str]) -> Child:
        """Start ``python -m memfabric ARGUMENTS… --parent-pid … --report-fd …``.

        Raises:
            UnavailableError: the system cannot start another process.
        """
        report_read, report_write = os.pipe2(os.O_CLOEXEC)
        command = [sys.executable, "-m", "memfabric", *arguments]
        command += ["--parent-pid", str(os.getpid()), "--report-fd", str(report_write)]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[report_write],
                start_new_session=True,
            )
        except OSError as error:
            os.close(report_read)
            raise UnavailableError(f"cannot start {name}: {error}") from error
        finally:
            os.close(report_write)
        child = Child(name, process)
        self.children.append(child)
        assert process.stdout is not None
        output = os.dup(process.stdout.fileno())
        process.stdout.close()
        for fd, is_report in ((report_read, True), (output, False)):
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ, (child, _Lines(fd), is_report))
        return child

    def running(self) -> list[Child]:
        """Children that were not seen to end."""
        return [child for child in self.children if child.status is None]

    def wait(self, timeout_s: float | None = None) -> list[Event]:
        """What happened; blocks until something did or `timeout_s` passed (None: for ever).

        What a child wrote before its end is told before its end.
        """
        events: list[Event] = []
        ready = self._selector.select(timeout_s)
        for key, _ in ready:
            if key.data is None:
                _drain(key.fd)
            else:
                events += self._read(*key.data)
        for child in self.running():
            status = child.process.poll()
            if status is not None:
                events += self._read_rest(child)
                child.status = status
                events.append(Exited(child, status))
        while self._signals:
            events.append(Signalled(self._signals.popleft()))
        return events

    def stop(self, children: Sequence[Child], timeout_s: float, on_event: Callable[[Event], None]) -> list[Child]:
        """Ask `children` to end, wait, and kill what is left; returns those that had to be killed.

        They are killed when `timeout_s` has passed or when the parent is asked to stop once more. All events
        meanwhile go to `on_event`, of other children too.
        """
        for child in children:
            if child.status is None:
                child.process.terminate()
        deadline_s = time.monotonic() + timeout_s
        killed: list[Child] = []
        while left := [child for child in children if child.status is None]:
            events = self.wait(max(0.0, deadline_s - time.monotonic()) if not killed else None)
            impatient = any(isinstance(event, Signalled) for event in events)
            for event in events:
                on_event(event)
            if not killed and (impatient or time.monotonic() >= deadline_s):
                killed = [child for child in left if child.status is None]
                for child in killed:
                    child.process.kill()
        return killed

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(signal.Signals(number))

    def _read(self, child: Child, lines: _Lines, is_report: bool) -> list[Event]:
        found, ended = lines.read()
        if ended:
            self._selector.unregister(lines.fd)
            os.close(lines.fd)
        events: list[Event] = []
        for raw in found:
            if is_report:
                report = _parse_report(raw)
                if report is not None:
                    events.append(Reported(child, report))
                    continue
            text = raw.decode(errors="replace").rstrip()
            child.tail.append(text)
            events.append(Logged(child, text))
        return events

    def _read_rest(self, child: Child) -> list[Event]:
        """What an ended child's pipes hold now. A grandchild may keep them open: their end is not awaited."""
        events: list[Event] = []
        for key in list(self._selector.get_map().values()):
            if key.data is None or key.data[0] is not child:
                continue
            events += self._read(*key.data)
        return events


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to end this process with SIGTERM when its parent dies; end it now if that has happened.

    Raises:
        SystemExit: the process that should be the parent is not, so it is gone.
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if os.getppid() != parent_pid:  # it died before the call above: no signal will come
        raise SystemExit(1)


class Reporter:
    """A child's end of its report pipe. Reports to nobody (no `fd`, or a parent that is gone) are dropped."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        if fd is not None:
            os.set_inheritable(fd, False)

    def report(self, **what: Any) -> None:
        """Send one report; values must be JSON. Never blocks for long and never fails."""
        if self._fd is None:
            return
        try:
            os.write(self._fd, json.dumps(what).encode() + b"\n")
        except BrokenPipeError:
            # the parent is gone; the kernel's signal is on its way
            self._fd = None


def _parse_report(raw: bytes) -> dict[str, Any] | None:
    try:
        report = json.loads(raw)
    except ValueError:
        return None
    return report if isinstance(report, dict) else None


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 4096):
            pass
    except BlockingIOError:
        pass
