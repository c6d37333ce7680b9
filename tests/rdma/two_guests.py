"""A small pool over two hosts and RDMA: server and memory node in one guest, clients in the other.

Run by `make test-rdma` in both guests: ``rxe-vm --nodes 2 -- python -m tests.rdma.two_guests``. The second one plays
the clients and tells the first what to do to the node; its exit status is the verdict.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import memfabric
from memfabric.client import AdminClient, GetStatus, PutStatus
from memfabric.core.messages import NamespaceSpec
from memfabric.errors import MemfabricError, UnavailableError

NODES = [f"192.0.2.{number + 1}" for number in range(2)]
SERVER = f"tcp://{NODES[0]}:7170"
CONTROL = (NODES[0], 7171)
SPEC = NamespaceSpec(name="guests", block_bytes=64 << 10, segments=4)
BLOCKS = 48
CUT_S = 3.0
PATIENCE_S = 240.0


def say(text: str) -> None:
    print(f"guest {os.environ['RXE_VM_NODE']}: {text}", flush=True)


def eventually(condition: Callable[[], Any], what: str) -> Any:
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        try:
            found = condition()
        except (MemfabricError, OSError) as error:
            found, what = None, f"{what} ({error})"[:500]
        if found:
            return found
        time.sleep(0.25)
    raise AssertionError(f"did not happen within {PATIENCE_S:.0f} s: {what}")


# --- the first guest: server, node, and whoever does things to them ---


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "memfabric", *arguments], stdout=sys.stderr)


def start_node() -> subprocess.Popen[bytes]:
    return start(
        *("node", "--name", "far", "--memory", "16MiB", "--region", "8MiB", "--address", SERVER),
        *("--transport", "verbs", "--timeout", "120s"),
    )


def cut_cable() -> None:
    time.sleep(0.5)
    for state in ("down", "up"):
        subprocess.run(["ip", "link", "set", "eth0", state], check=True, timeout=30)
        time.sleep(CUT_S)


def host() -> None:
    server = start("meta", "--address", SERVER, "--insecure", "--dead-after", "10s")
    node = start_node()
    with socket.create_server(CONTROL) as listener:
        listener.settimeout(PATIENCE_S)
        wire, _ = listener.accept()
        with wire, wire.makefile("rw") as lines:
            for order in lines:
                say(order.strip())
                if order == "kill\n":
                    node.kill()
                    node.wait()
                elif order == "start\n":
                    node = start_node()
                elif order == "freeze\n":
                    node.send_signal(signal.SIGSTOP)
                elif order == "cut\n":
                    cut = threading.Thread(target=cut_cable)
                    cut.start()
                elif order == "thaw\n":
                    node.send_signal(signal.SIGCONT)
                lines.write("done\n")
                lines.flush()
    for each in (node, server):
        each.terminate()
        assert each.wait(30.0) == 0, "a process did not end in good order"


# --- the second guest: clients ---


def content(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, BLOCKS * SPEC.block_bytes, np.uint8)


def connect() -> memfabric.Client:
    return memfabric.connect(
        SERVER, namespace=SPEC.name, create=SPEC, transport="verbs", timeout_s=60.0, copy_threads=1
    )


def tokens(seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(0, 50_000, BLOCKS * SPEC.block_tokens)


def store(client: memfabric.Client, seed: int) -> memfabric.BlockKeys:
    keys = client.block_keys(tokens(seed))
    stored = client.put(keys, content(seed))
    assert (stored.status == PutStatus.STORED).all(), stored
    return keys


def fetch(client: memfabric.Client, seed: int, **options: Any) -> int:
    """Blocks found; their bytes are right or this raises."""
    keys, out = client.block_keys(tokens(seed)), np.zeros(BLOCKS * SPEC.block_bytes, np.uint8)
    got = client.get(keys, out, **options)
    found = got.status == GetStatus.OK
    rows, want = out.reshape(BLOCKS, -1), content(seed).reshape(BLOCKS, -1)
    assert (rows[found] == want[found]).all(), "wrong bytes"
    return int(found.sum())


def registered_memory(client: memfabric.Client) -> None:
    out, before = np.zeros(BLOCKS * SPEC.block_bytes, np.uint8), client.stats()["verbs.staged_bytes"]
    with client.register(out):
        assert client.get(client.block_keys(tokens(1)), out).ok
        assert (out == content(1)).all()
    assert client.stats()["verbs.staged_bytes"] - before < SPEC.block_bytes, "only headers are staged"


def play(order: Callable[[str], None]) -> None:
    with AdminClient(SERVER, timeout_s=60.0) as admin:
        eventually(lambda: admin.status()["nodes"], "the node joins")
    with connect() as writer, connect() as reader:
        eventually(lambda: writer.stats()["regions"] > 0, "the namespace gets a region")
        store(writer, 1)
        staged = writer.stats()["verbs.staged_bytes"]
        assert staged >= BLOCKS * SPEC.block_bytes, "memory that nobody registered goes through staging"
        assert fetch(reader, 1, leased=True) == BLOCKS
        assert fetch(reader, 1) == BLOCKS, "by places that are known"
        registered_memory(reader)
        (path,) = reader.stats()["paths"]
        say(f"reads travel by {path['data_path']}")
        assert path["transport"] == "verbs", path
        order("freeze")
        assert fetch(reader, 1) == BLOCKS, "one-sided: the node's processor takes no part"
        order("thaw")
        order("cut")
        begun_s, losses = time.monotonic(), 0
        while time.monotonic() < begun_s + CUT_S + 2.0:
            try:
                losses += fetch(reader, 1, timeout_s=2.0) < BLOCKS
            except UnavailableError:  # the server is behind the same link
                losses += 1
        assert losses, "bytes came over a link that was down"
        say(f"{losses} reads failed while the link was down")
        eventually(lambda: fetch(reader, 1) == BLOCKS, "reads go on when the link is back")
        order("kill")
        begun_s = time.monotonic()
        assert fetch(reader, 1, timeout_s=20.0) == 0, "bytes of a dead node"
        say(f"a read of a dead node ended after {time.monotonic() - begun_s:.1f} s")
        eventually(lambda: writer.stats()["regions"] == 0, "the node is known to be dead")
        order("start")

        eventually(lambda: writer.stats()["regions"] > 0, "the next life of the node comes")
        store(writer, 2)
        assert fetch(reader, 2) == BLOCKS
        assert fetch(reader, 1) == 0
    say("all is well")


def main() -> None:
    if os.environ["RXE_VM_NODE"] == "0":
        host()
        return
    wire = eventually(lambda: socket.create_connection(CONTROL, 5.0), "the first guest listens")
    with wire, wire.makefile("rw") as lines:
        wire.settimeout(PATIENCE_S)

        def order(what: str) -> None:
            lines.write(f"{what}\n")
            lines.flush()
            assert lines.readline() == "done\n"

        play(order)


if __name__ == "__main__":
    main()
