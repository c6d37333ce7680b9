"""Real processes for tests: start them, wait until they are ready, stop, freeze and kill them by pid, clean up always.

Every child speaks JSON lines on its stdout (the first says that it is ready), takes JSON lines on its stdin, logs to
a file, and dies with the test process. `Pool` owns a private directory in /dev/shm, so that "nothing is left" can be
checked while other pools run on the machine.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import memfabric
from memfabric.client import AdminClient
from memfabric.core.messages import NamespaceSpec
from memfabric.errors import RefusedError
from transport import ShmTransport

TRANSPORT = os.environ.get("MEMFABRIC_TEST_TRANSPORT", "auto")
"""Of nodes and clients of every test that does not choose one itself."""
ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
MS = 1_000_000
START_S = 60.0
"""How long anything may take that has to happen. Generous: a test never passes because this ran out."""


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = START_S) -> Any:
    """Poll until the condition is true; returns its value."""
    end_s = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end_s:
            raise AssertionError(f"did not happen within {timeout_s:.0f} s: {what}")
        time.sleep(0.02)


class EndedError(AssertionError):
    """A child ended, or did not answer, where an answer was needed."""


class Child:
    """One process. `events` holds what it said and nobody took yet."""

    def __init__(self, name: str, role: str, arguments: dict[str, Any], log: Path) -> None:
        self.name, self.role, self.log = name, role, log
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.stopped = False
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.processes.roles", role, json.dumps(arguments)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        self.pid = self.process.pid
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                self._lines.put(json.loads(line))
            except ValueError:
                self._lines.put({"event": "noise", "line": line.decode(errors="replace")})
        self._lines.put(None)

    def wait_event(self, event: str, timeout_s: float = START_S) -> dict[str, Any]:
        """The next event of that kind; others are dropped.

        Raises:
            EndedError: the child ended without it, or said nothing for too long.
        """
        end_s = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.01, end_s - time.monotonic()))
            except queue.Empty:
                raise EndedError(f"{self.name} (pid {self.pid}) did not say {event!r} in {timeout_s:.0f} s") from None
            if line is None:
                self._lines.put(None)
                raise EndedError(f"{self.name} (pid {self.pid}) ended with {self.process.wait(10)} before {event!r}")
            if line.get("event") == event:
                return line

    def say(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, op: str, timeout_s: float = START_S, **arguments: Any) -> dict[str, Any]:
        """Have a puppet do something; its answer."""
        self.say(op=op, **arguments)
        return self.wait_event("answer", timeout_s)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def freeze(self) -> None:
        """SIGSTOP, and wait until the kernel has stopped every thread of it."""
        self.process.send_signal(signal.SIGSTOP)
        self.stopped = True
        self.wait_frozen()

    def wait_frozen(self) -> None:
        """Wait until the process is stopped, by whomever."""

        def all_stopped() -> bool:
            states = []
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                try:
                    states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
                except OSError:
                    continue  # that thread ended just now
            return all(state in "TtZ" for state in states)

        eventually(all_stopped, f"{self.name} stopped")
        self.stopped = True

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.stopped = False

    def kill(self) -> None:
        """kill -9."""
        if self.alive:
            self.process.kill()
        self.process.wait(START_S)

    def terminate(self, timeout_s: float = START_S) -> int:
        """SIGTERM; the exit status.

        Raises:
            EndedError: it did not end; it is killed then.
        """
        if self.alive:
            if self.stopped:
                self.thaw()
            self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise EndedError(f"{self.name} did not end within {timeout_s:.0f} s of SIGTERM") from None

    def dismiss(self, timeout_s: float = START_S) -> int:
        """Have a client process close its client and end; the exit status."""
        if self.stopped:
            self.thaw()
        self.say(op="exit")
        return self.process.wait(timeout_s)

    def log_tail(self, limit: int = 4000) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text[-limit:]


class Pool:
    """A pool of real processes in a private shared-memory directory. A context manager."""

    def __init__(
        self, scratch: Path, spec: NamespaceSpec, *, transport: str = TRANSPORT, address: str = "", **server: Any
    ) -> None:
        """`transport` is of nodes and clients; `server`: fields of `ServerOptions`."""
        self.scratch, self.spec, self.transport = scratch, spec, transport
        self.server_options: dict[str, Any] = {"session_ttl_ns": 4000 * MS, "quarantine_ns": 500 * MS, **server}
        self.directory = Path(tempfile.mkdtemp(prefix="mf-test-", dir="/dev/shm"))
        self.records = scratch / "records"
        self.records.mkdir(exist_ok=True)
        self.address = address or "tcp://127.0.0.1:0"
        self.children: list[Child] = []
        self._count = 0
        self.server: Child
        self.nodes: dict[str, Child] = {}

    # --- life ---

    def __enter__(self) -> Pool:
        try:
            self.start_server()
            with self.admin() as admin:
                admin.namespace_create(self.spec)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self.children:
            child.kill()
        if error is not None:
            self.print_logs()
        shutil.rmtree(self.directory, ignore_errors=True)

    def print_logs(self) -> None:
        """Shown by pytest with the failure."""
        for child in self.children:
            print(f"\n--- {child.name} (pid {child.pid}, status {child.process.returncode})\n{child.log_tail()}")

    def spawn(self, name: str, role: str, /, **arguments: Any) -> Child:
        """Start a child; it is not ready yet."""
        self._count += 1
        child = Child(name, role, arguments, self.scratch / f"{self._count:03}-{name}.log")
        self.children.append(child)
        return child

    # --- roles ---

    def start_server(self) -> Child:
        """Start (again, at the same address)."""
        self.server = self.spawn("server", "server", address=self.address, **self.server_options)
        self.address = str(self.server.wait_event("ready")["address"])
        return self.server

    def node_arguments(self, name: str, memory: int, region: int | None = None) -> dict[str, Any]:
        return {
            "name": name,
            "server": self.address,
            "memory_bytes": memory,
            "region_bytes": region or memory,
            "directory": str(self.directory),
            "transport": self.transport,
            "insecure": bool(self.server_options.get("insecure")),
        }

    def start_node(self, name: str, memory: int = 8 * MIB, region: int | None = None) -> Child:
        child = self.spawn(f"node-{name}", "node", **self.node_arguments(name, memory, region))
        self.nodes[name] = child
        child.wait_event("ready")
        return child

    def start_worker(self, name: str, role: str, /, *, ready: bool = True, **arguments: Any) -> Child:
        """A client process: ``writer``, ``reader`` or ``puppet`` (see `workers`)."""
        self._count += 1
        child = self.spawn(
            name,
            role,
            address=self.address,
            directory=str(self.directory),
            spec=spec_arguments(self.spec),
            records=str(self.records / f"{self._count:03}-{name}.records"),
            writer=self._count,
            transport=self.transport,
            **arguments,
        )
        if ready:
            child.wait_event("ready")
        return child

    def puppet(self, name: str = "puppet", **arguments: Any) -> Child:
        return self.start_worker(name, "puppet", **arguments)

    # --- looking ---

    def connect(self, **arguments: Any) -> memfabric.Client:
        """A client in the test process."""
        return memfabric.connect(
            self.address,
            namespace=self.spec.name,
            create=self.spec,
            shm_directory=str(self.directory),
            transport=self.transport,
            **{"timeout_s": 20.0, **arguments},
        )

    @contextmanager
    def admin(self) -> Iterator[AdminClient]:
        with AdminClient(self.address, timeout_s=20.0) as client:
            yield client

    def namespace(self) -> Any:
        """The namespace as the server sees it."""
        with self.admin() as admin:
            return admin.namespace_show(self.spec.name)

    def wait_nodes(self, *names: str) -> None:
        """Wait until exactly these nodes are alive, and the namespace has a region of each."""

        def there() -> bool:
            with self.admin() as admin:
                alive = {node["name"] for node in admin.nodes() if node["state"] == "active"}
            try:
                return alive == set(names) and (not names or self.namespace().regions >= len(names))
            except RefusedError:
                return False  # a server that was started again learns the namespace from the first client

        eventually(there, f"living nodes are {names}")

    def region_files(self) -> list[Path]:
        return sorted(self.directory.glob("memfabric.*"))

    # --- the end ---

    def shut_down(self, *, swept: bool = False) -> None:
        """SIGTERM to everything; all end well, and nothing is left in shared memory.

        Args:
            swept: a node was killed and not started again: what it left goes with the next start, done here.
        """
        for child in reversed(self.children):
            if child.alive:
                status = child.terminate() if child.role in ("server", "node") else child.dismiss()
                assert status == 0, f"{child.name} ended with {status}"
        if swept:
            ShmTransport(str(self.directory)).sweep()
        left = [path.name for path in self.directory.iterdir()]
        assert not left, f"left in shared memory: {left}"


def spec_arguments(spec: NamespaceSpec) -> dict[str, Any]:
    """The fields a worker needs to create the same namespace."""
    return {"name": spec.name, "block_bytes": spec.block_bytes, "segments": spec.segments}
