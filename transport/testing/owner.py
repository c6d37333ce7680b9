"""An owner of regions in a process of its own, told what to do over pipes: ``python -m transport.testing.owner``."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from transport._native import digest
from transport.base import Exchange, Region, Transport, UInt8Column
from transport.errors import TransportError, UnreachableError

ANSWER_S = 60.0


def make(factory: str, options: dict[str, Any]) -> Transport:
    """Call ``module:attribute`` with options."""
    module, _, name = factory.partition(":")
    made = getattr(importlib.import_module(module), name)(**options)
    assert isinstance(made, Transport)
    return made


def pattern(seed: int, length: int) -> UInt8Column:
    """Bytes that are the same for the same seed."""
    found: UInt8Column = np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)
    return found


class Owner(Protocol):
    """What the suite asks of an owner, wherever it runs. A context manager."""

    def start(self) -> None:
        """Begin its next life, after the last has ended."""

    def create(self, region_id: int, size_bytes: int, seed: int | None = None) -> bytes:
        """A region, filled from a seed or zeros; its descriptor."""

    def bytes_of(self, region_id: int, offset: int, length: int) -> UInt8Column:
        """What is in the region now, as its owner sees it."""

    def digest_of(self, region_id: int, offset: int = 0, length: int = -1) -> int:
        """The digest of a range now."""

    def close_region(self, region_id: int) -> None:
        """Withdraw it; its memory stays, so that later changes can be seen."""

    def fence(self, identity: bytes) -> bool:
        """As `Transport.fence`; raises `TransportError` as that does."""

    def exchange(self, identity: bytes) -> Exchange:
        """What a client with this identity may be given to connect."""

    def freeze(self) -> None:
        """Stop it: when this has returned, none of its code runs."""

    def thaw(self) -> None:
        """Let it go on."""

    def kill(self) -> None:
        """End it without a chance to clean up."""

    def __enter__(self) -> Owner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class OwnerProcess:
    """The near end: starts the process, kills, stops and restarts it. A context manager."""

    def __init__(self, factory: str, options: dict[str, Any]) -> None:
        self._job = json.dumps({"factory": factory, "options": options})
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._lock = threading.Lock()
        self.start()

    def start(self) -> None:
        """Start it, or another one after the last has ended."""
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        root = str(Path(__file__).parents[2])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "transport.testing.owner", self._job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        )
        threading.Thread(target=self._listen, args=(self.process, self._answers), daemon=True).start()
        self.identity = bytes.fromhex(self._wait()["identity"])

    @staticmethod
    def _listen(process: subprocess.Popen[bytes], answers: queue.SimpleQueue[dict[str, Any] | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                answers.put(json.loads(line))
        answers.put(None)

    def _wait(self) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=ANSWER_S)
        except queue.Empty:
            raise AssertionError(f"the owner did not answer within {ANSWER_S:.0f} s\n{self.log()}") from None
        if answer is None:
            raise AssertionError(f"the owner ended with {self.process.wait(10)}\n{self.log()}")
        return answer

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Have it do something; its answer.

        Raises:
            TransportError: what its transport raised, in words.
        """
        with self._lock:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
            answer = self._wait()
        if "error" in answer:
            raise TransportError(f"{answer['error']}: {answer['message']}")
        return answer

    def create(self, region_id: int, size_bytes: int, seed: int | None = None) -> bytes:
        """A region, filled from a seed or zeros; its descriptor."""
        return bytes.fromhex(self.ask("create", region_id=region_id, size_bytes=size_bytes, seed=seed)["descriptor"])

    def bytes_of(self, region_id: int, offset: int, length: int) -> UInt8Column:
        """What is in the region now, as its owner sees it."""
        found: UInt8Column = np.frombuffer(
            bytes.fromhex(self.ask("peek", region_id=region_id, offset=offset, length=length)["bytes"]), np.uint8
        )
        return found

    def digest_of(self, region_id: int, offset: int = 0, length: int = -1) -> int:
        """The digest of a range now."""
        return int(self.ask("digest", region_id=region_id, offset=offset, length=length)["digest"])

    def close_region(self, region_id: int) -> None:
        """Withdraw it; its memory stays with the process, so that later changes can be seen."""
        self.ask("close", region_id=region_id)

    def fence(self, identity: bytes) -> bool:
        """As `Transport.fence`."""
        return bool(self.ask("fence", identity=identity.hex())["known"])

    def exchange(self, identity: bytes) -> Exchange:
        """What a client with this identity may be given to connect."""

        def carry(hello: bytes, deadline_ns: int) -> bytes:
            if self.process.poll() is not None:
                raise UnreachableError("the owner has ended")
            return bytes.fromhex(self.ask("accept", hello=hello.hex(), identity=identity.hex())["welcome"])

        return carry

    def freeze(self) -> None:
        """SIGSTOP, until every thread has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        end_s = time.monotonic() + ANSWER_S
        while time.monotonic() < end_s:
            states = []
            for task in Path(f"/proc/{self.process.pid}/task").iterdir():
                states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
            if all(state in "TtZ" for state in states):
                return
            time.sleep(0.01)
        raise AssertionError("the owner does not stop")

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(ANSWER_S)

    def log(self) -> str:
        """What it said on standard error."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), 8192, max(0, size - 8192)).decode(errors="replace")

    def close(self) -> int:
        """End it in good order; its exit status."""
        if self.process.poll() is None:
            self.thaw()
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(ANSWER_S)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.wait()

    def __enter__(self) -> OwnerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(self.log())  # noqa: T201  # pytest shows it with the failure
        self.process.kill()
        self.process.wait()
        self._log.close()


# --- the far end ---


class _Owner:
    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.regions: dict[int, Region] = {}
        self.memory: dict[int, UInt8Column] = {}

    def do_create(self, region_id: int, size_bytes: int, seed: int | None) -> dict[str, Any]:
        region = self.transport.create_region(f"conformance-{os.getpid()}", region_id, size_bytes)
        if seed is not None:
            region.buffer[:] = pattern(seed, size_bytes)
        self.regions[region_id], self.memory[region_id] = region, region.buffer
        return {"descriptor": region.descriptor.hex()}

    def do_peek(self, region_id: int, offset: int, length: int) -> dict[str, Any]:
        return {"bytes": bytes(self.memory[region_id][offset : offset + length]).hex()}

    def do_digest(self, region_id: int, offset: int, length: int) -> dict[str, Any]:
        end = self.memory[region_id].size if length < 0 else offset + length
        return {"digest": digest(np.ascontiguousarray(self.memory[region_id][offset:end]))}

    def do_close(self, region_id: int) -> dict[str, Any]:
        self.regions.pop(region_id).close()
        return {}

    def do_fence(self, identity: str) -> dict[str, Any]:
        return {"known": self.transport.fence(bytes.fromhex(identity))}

    def do_accept(self, hello: str, identity: str) -> dict[str, Any]:
        return {"welcome": self.transport.accept(bytes.fromhex(hello), bytes.fromhex(identity)).hex()}

    def do_stats(self) -> dict[str, Any]:
        return {"stats": self.transport.stats()}

    def do_write_words(self, region_id: int, count: int, rounds: int) -> dict[str, Any]:
        """Rewrite the first `count` 64-bit words, all with the number of the round, again and again."""
        words = self.memory[region_id].view(np.uint64)
        for number in range(rounds):
            words[:count] = number
        return {}


def main() -> int:
    """Serve commands until standard input ends."""
    job = json.loads(sys.argv[1])
    say = os.fdopen(os.dup(1), "wb", buffering=0)  # what libraries print on standard output is no answer
    os.dup2(2, 1)
    with make(job["factory"], job["options"]) as transport:
        owner = _Owner(transport)
        say.write(json.dumps({"identity": transport.identity.hex()}).encode() + b"\n")
        for line in sys.stdin:
            command = json.loads(line)
            try:
                answer = getattr(owner, f"do_{command.pop('op')}")(**command)
            except (TransportError, ValueError) as error:
                answer = {"error": type(error).__name__, "message": str(error)}
            say.write(json.dumps(answer).encode() + b"\n")
        for region in owner.regions.values():
            region.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
