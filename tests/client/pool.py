"""A real pool for tests: metadata server and memory nodes, in threads or in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import memfabric
from memfabric.node import Node, NodeOptions
from memfabric.server import Server, ServerOptions

MIB = 1 << 20
TRANSPORT = os.environ.get("MEMFABRIC_TEST_TRANSPORT", "auto")
"""Of nodes and clients of every test that does not choose one itself."""


class ThreadPool:
    """Server and nodes in threads of this process: quick, and their state can be looked at."""

    def __init__(self, directory: Path, *, memory_bytes: int = 16 * MIB, region_bytes: int = 4 * MIB, **options: Any):
        self.directory = directory
        self.memory_bytes, self.region_bytes = memory_bytes, region_bytes
        self.options = options
        self.server = Server(ServerOptions(address="tcp://127.0.0.1:0", **options))
        self.address = self.server.address
        self._server_thread = threading.Thread(target=self.server.run, daemon=True)
        self._server_thread.start()
        self.nodes: dict[str, tuple[Node, threading.Thread]] = {}

    def add_node(self, name: str) -> Node:
        ready = threading.Event()
        node = Node(
            NodeOptions(
                name=name,
                server=self.address,
                memory_bytes=self.memory_bytes,
                region_bytes=self.region_bytes,
                directory=self.directory,
                transport=TRANSPORT,
            )
        )
        thread = threading.Thread(target=node.run, kwargs={"ready": ready.set}, daemon=True)
        thread.start()
        assert ready.wait(10), "the node did not register"
        self.nodes[name] = (node, thread)
        return node

    def stop_node(self, name: str) -> None:
        node, thread = self.nodes.pop(name)
        node.stop()
        thread.join(10)

    def stop_server(self) -> None:
        if self._server_thread.is_alive():
            self.server.stop()
            self._server_thread.join(10)

    def restart_server(self) -> None:
        """A new incarnation at the same address; it remembers nothing."""
        self.stop_server()
        self.server = Server(ServerOptions(address=self.address, **self.options))
        self._server_thread = threading.Thread(target=self.server.run, daemon=True)
        self._server_thread.start()

    def close(self) -> None:
        for name in list(self.nodes):
            self.stop_node(name)
        self.stop_server()

    def connect(self, namespace: str = "demo", **arguments: Any) -> memfabric.Client:
        return memfabric.connect(
            self.address, namespace=namespace, shm_directory=str(self.directory), **{"timeout_s": 10.0, **arguments}
        )


class ProcessPool:
    """Server and nodes in processes of their own, to be killed and stopped."""

    def __init__(self, directory: Path, scratch: Path, *, meta_options: tuple[str, ...] = ()) -> None:
        self.directory, self.scratch = directory, scratch
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        ready = self._start("meta", "meta", "--address", "tcp://127.0.0.1:0", *meta_options)
        self.address = str(ready["address"])
        self.meta_options = meta_options

    def _start(self, name: str, *arguments: str) -> dict[str, Any]:
        path = self.scratch / f"{name}.json"
        path.unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "memfabric", *arguments, "--log-level", "warning", "--ready-file", str(path)],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.processes[name] = process
        wait_for(lambda: path.exists() or process.poll() is not None, 20)
        assert process.poll() is None, f"{name} ended with {process.returncode}"
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def add_node(self, name: str, memory_bytes: int = 16 * MIB, region_bytes: int = 4 * MIB) -> None:
        arguments = ["--name", name, "--address", self.address, "--directory", str(self.directory)]
        arguments += ["--transport", TRANSPORT]
        self._start(name, "node", *arguments, "--memory", str(memory_bytes), "--region", str(region_bytes))

    def restart_server(self) -> None:
        self._start("meta", "meta", "--address", self.address, *self.meta_options)

    def signal(self, name: str, number: int) -> None:
        self.processes[name].send_signal(number)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait(10)

    def close(self) -> None:
        for name in sorted(self.processes, key=lambda name: name == "meta"):
            process = self.processes[name]
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)

    def connect(self, namespace: str = "demo", **arguments: Any) -> memfabric.Client:
        return memfabric.connect(
            self.address, namespace=namespace, shm_directory=str(self.directory), **{"timeout_s": 10.0, **arguments}
        )


def wait_for(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "timed out"
        time.sleep(0.01)


@contextmanager
def closing(thing: Any) -> Iterator[Any]:
    try:
        yield thing
    finally:
        thing.close()
