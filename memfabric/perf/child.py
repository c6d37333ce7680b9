"""A process of a sweep: ``python -m memfabric.perf.child PARENT_PID owner|client``.

An owner lends a region; a client measures. Commands come on standard input and are answered on standard output
(`messages`), errors of libraries go to standard error. It ends when its input ends or its parent does, and gives back
what it holds.
"""

from __future__ import annotations

import abc
import os
import signal
import sys
from contextlib import ExitStack
from types import FrameType
from typing import BinaryIO

import msgspec

from memfabric.errors import MemfabricError, UsageError
from memfabric.perf import messages
from memfabric.perf.memory import Memory
from memfabric.perf.pool_work import PoolWork
from memfabric.perf.raw_work import RawWork
from memfabric.perf.work import Sockets, Work
from memfabric.processes import die_with_parent
from transport import Transport, registry
from transport.errors import TransportError, UnreachableError

REGION_ID = 1
_decoder: msgspec.json.Decoder[messages.Command] = msgspec.json.Decoder(messages.Command)


class _Far(abc.ABC):
    """Commands in, answers out."""

    def __init__(self, out: BinaryIO) -> None:
        self.stack = ExitStack()
        self._out = out

    def say(self, answer: messages.Answer) -> None:
        self._out.write(msgspec.json.encode(answer) + b"\n")
        self._out.flush()

    @abc.abstractmethod
    def handle(self, command: messages.Command) -> messages.Answer:
        """Do what a command says."""

    def serve(self) -> None:
        with self.stack:
            try:
                while line := sys.stdin.buffer.readline():
                    self.say(self._answer(line))
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is held is given back undisturbed

    def _answer(self, line: bytes) -> messages.Answer:
        try:
            return self.handle(_decoder.decode(line))
        except MemoryError as error:
            return messages.Failed(kind="MemoryError", message=str(error) or "out of memory")
        except (MemfabricError, TransportError, OSError, ValueError, TypeError, RuntimeError) as error:
            return messages.Failed(kind=type(error).__name__, message=str(error))


class _Owner(_Far):
    _transport: Transport

    def handle(self, command: messages.Command) -> messages.Answer:
        if isinstance(command, messages.Lend):
            self._transport = self.stack.enter_context(registry.create(command.transport, **command.options))
            self._transport.sweep()
            name = f"perf-{os.getpid()}"
            region = self._transport.create_region(name, REGION_ID, command.size_bytes)
            self.stack.enter_context(region)
            return messages.Lent(descriptor=region.descriptor, info=self._transport.info())
        if isinstance(command, messages.Accept):
            try:
                return messages.Welcome(welcome=self._transport.accept(command.hello, command.identity))
            except TransportError as error:
                return messages.Welcome(error=f"{type(error).__name__}: {error}")
        if isinstance(command, messages.Finish):
            return messages.Done()
        raise UsageError(f"an owner cannot {type(command).__name__}")


class _Client(_Far):
    def __init__(self, out: BinaryIO) -> None:
        super().__init__(out)
        self._sockets: Sockets | None = None
        self._pool: messages.OpenPool | None = None
        self._through: Transport | None = None
        self._handle = -1
        self._kind = "cpu"
        self._work: Work | None = None
        self.stack.callback(self._finish)

    def handle(self, command: messages.Command) -> messages.Answer:
        if isinstance(command, messages.OpenPool | messages.OpenRegion):
            return self._open(command)
        if isinstance(command, messages.Prepare):
            self._finish()
            if self._pool is not None:
                self._work = PoolWork(self._pool, self._sockets, command)
            elif self._through is not None:
                self._work = RawWork(self._through, self._handle, self._kind, self._sockets, command)
            else:
                raise UsageError("nothing was opened")
            return self._work.ready
        if isinstance(command, messages.Run) and self._work is not None:
            return self._work.run(command)
        if isinstance(command, messages.Finish):
            self._finish()
            return messages.Done()
        raise UsageError(f"a client cannot {type(command).__name__} now")

    def _open(self, command: messages.OpenPool | messages.OpenRegion) -> messages.Opened:
        Memory(command.kind, 1, 1, 1)  # is there such memory?
        if command.stream_port:
            self._sockets = Sockets(command.stream_port)
            self.stack.callback(self._sockets.close)
        self._kind = command.kind
        if isinstance(command, messages.OpenPool):
            self._pool = command
            return messages.Opened(info={})
        self._through = self.stack.enter_context(registry.create(command.transport, **command.options))
        exchange = self._exchange if self._through.capabilities.needs_exchange else None
        self._handle = self._through.connect(command.descriptor, writable=True, exchange=exchange)
        return messages.Opened(info=self._through.info())

    def _exchange(self, hello: bytes, deadline_ns: int) -> bytes:
        """Through the sweep to the owner and back."""
        assert self._through is not None
        self.say(messages.Exchange(hello=hello, identity=self._through.identity, deadline_ns=deadline_ns))
        answer = _decoder.decode(sys.stdin.buffer.readline())
        if not isinstance(answer, messages.Welcome) or answer.error:
            raise UnreachableError(f"the owner refused: {getattr(answer, 'error', answer)}")
        return answer.welcome

    def _finish(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.close()


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: list[str]) -> int:
    """Serve until the input ends."""
    signal.signal(signal.SIGTERM, _stop)
    die_with_parent(int(arguments[0]))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    (_Owner if arguments[1] == "owner" else _Client)(out).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
