"""The near end of a sweep's processes: started, told what to do, listened to, ended.

They are detached from the terminal, so that Ctrl-C reaches only the sweep, which then ends them; they end with it even
when it is killed. Invariant: a `Child` that was closed does not run.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

import memfabric
from memfabric.errors import MemfabricError
from memfabric.perf import messages

STOP_S = 10.0
_GRACE_S = 1.0
"""For what a process is doing when its input ends; then it is told to stop at once."""
_TAIL_BYTES = 2000
_A = TypeVar("_A", bound=messages.Answer)
_decoder: msgspec.json.Decoder[messages.Answer] = msgspec.json.Decoder(messages.Answer)


class PointError(MemfabricError):
    """A point could not be measured; others can.

    Attributes:
        kind: class of the error in the process where it happened, if it did in one.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class SettingError(MemfabricError):
    """What runs in the meantime is gone; none of its points can be measured any more."""


class Child:
    """A process: ``python -m memfabric.perf.child``. A context manager.

    Attributes:
        name: for messages.
    """

    def __init__(self, name: str, role: str, *arguments: str) -> None:
        """Start it.

        Raises:
            SettingError: the system can't.
        """
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
        self._rest = b""
        # The same memfabric as here, wherever that is, and not what lies in the working directory.
        here = str(Path(memfabric.__file__).parent.parent)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "memfabric.perf.child", str(os.getpid()), role, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                cwd="/",
                env={**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]).strip(":")},
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise SettingError(f"cannot start {name}: {error}") from error

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def send(self, command: messages.Command) -> None:
        """Give a command.

        Raises:
            SettingError: it has ended.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(msgspec.json.encode(command) + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def line(self, end_s: float) -> bytes:
        """The next line that it writes.

        Args:
            end_s: instant on `time.monotonic`.

        Raises:
            SettingError: it has ended, or wrote nothing in time.
        """
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, end_s - time.monotonic())):
                    raise SettingError(f"{self.name} (pid {self.pid}) did not answer in time{self.said()}")
                data = os.read(descriptor, 1 << 16)
                if not data:
                    raise self._ended()
                self._rest += data
        found, _, self._rest = self._rest.partition(b"\n")
        return found

    def said(self) -> str:
        """The end of what it wrote to standard error, as the tail of a message."""
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode(errors="replace").strip()
        return f":\n{text}" if text else ""

    def _ended(self) -> SettingError:
        try:
            status = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return SettingError(f"{self.name} (pid {self.pid}) closed its pipes{self.said()}")
        try:
            how = f"exit code {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
        except ValueError:  # a real-time signal has no name
            how = f"killed by signal {-status}"
        return SettingError(f"{self.name} (pid {self.pid}) ended unexpectedly, {how}{self.said()}")

    def close(self) -> None:
        """End it: in good order by closing its input, else by force."""
        if self._log.closed:
            return
        try:
            if self.process.poll() is None:
                assert self.process.stdin is not None
                try:
                    self.process.stdin.close()
                except OSError:
                    pass  # it ended just now
                self.process.send_signal(signal.SIGCONT)
                try:
                    self.process.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    self.process.terminate()
                    self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ask(
    children: Sequence[Child],
    commands: Sequence[messages.Command],
    expected: type[_A],
    timeout_s: float,
    exchange: Callable[[messages.Exchange], messages.Welcome] | None = None,
) -> list[_A]:
    """Give each child its command and await all answers.

    Args:
        exchange: answers what clients ask for meanwhile.

    Raises:
        PointError: a child could not do it; the others have answered all the same.
        SettingError: a child ended, or did not answer within `timeout_s`.
    """
    end_s = time.monotonic() + timeout_s
    for child, command in zip(children, commands, strict=True):
        child.send(command)
    found: list[_A] = []
    problem: PointError | None = None
    for child in children:
        answer = _answer(child, end_s, exchange)
        if isinstance(answer, messages.Failed):
            problem = problem or PointError(f"{child.name}: {answer.kind}: {answer.message}", answer.kind)
        elif isinstance(answer, expected):
            found.append(answer)
        else:
            raise SettingError(f"{child.name} answered {type(answer).__name__} instead of {expected.__name__}")
    if problem is not None:
        raise problem
    return found


def _answer(
    child: Child, end_s: float, exchange: Callable[[messages.Exchange], messages.Welcome] | None
) -> messages.Answer:
    while True:
        line = child.line(end_s)
        try:
            answer = _decoder.decode(line)
        except msgspec.DecodeError as error:
            raise SettingError(f"{child.name} wrote what is no answer: {line[:80]!r}: {error}") from error
        if not isinstance(answer, messages.Exchange):
            return answer
        if exchange is None:
            raise SettingError(f"{child.name} asks for an exchange, but there is no owner to ask")
        child.send(exchange(answer))
