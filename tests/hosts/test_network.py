"""The hosts themselves: they reach each other, a cut cable loses packets, nothing is left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from memfabric.errors import UsageError
from memfabric.testing import hosts
from memfabric.testing.hosts import Host, Hosts

SERVE = """
import socket, sys
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
while True:
    server.accept()[0].sendall(b"hello")
"""
ASK = """
import socket, sys
try:
    print(socket.create_connection((sys.argv[1], int(sys.argv[2])), 1.0).recv(9).decode())
except OSError:
    print("nothing")
"""


def ask(host: Host, address: str, port: int) -> str:
    command = host.command([sys.executable, "-c", ASK, address, str(port)])
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


def interfaces() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir() if path.is_symlink())


def test_cables_carry_are_cut_and_restored() -> None:
    with Hosts(3) as network:
        command = network[0].command([sys.executable, "-c", SERVE, network[0].address])
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                port = int(server.stdout.readline())
                assert [ask(network[n], network[0].address, port) for n in (0, 1, 2)] == ["hello"] * 3
                network.cut(1)
                assert [ask(network[n], network[0].address, port) for n in (1, 2)] == ["nothing", "hello"]
                network.restore(1)
                assert ask(network[1], network[0].address, port) == "hello"
            finally:
                server.kill()
    assert not [path for path in Path("/run/netns").iterdir() if f"-{os.getpid()}-" in path.name]


def test_what_a_killed_process_left_is_removed() -> None:
    make = "import os\nfrom memfabric.testing.hosts import Hosts\nHosts(2).__enter__()\nos._exit(9)"
    child = subprocess.Popen([sys.executable, "-c", make])
    assert child.wait(30) == 9
    left = {path.name for path in Path("/run/netns").iterdir() if f"-{child.pid}-" in path.name}
    assert len(left) == 3
    assert left <= set(hosts.remove_leftovers())


def test_a_thread_inside_a_host_is_there_and_nowhere_else() -> None:
    with Hosts(2) as network:
        before = Path.cwd(), interfaces()
        with network[1].inside(), socket.create_server((network[1].address, 0)) as server:
            assert interfaces() == [hosts.INTERFACE, "lo"]
            threading.Thread(target=time.sleep, args=(1.0,), daemon=True).start()  # one that stays
            port = server.getsockname()[1]
            socket.create_connection((network[1].address, port), 5.0).close()
        assert before == (Path.cwd(), interfaces())
        with pytest.raises(OSError):
            socket.create_connection((network[1].address, port), 0.2)


@pytest.mark.parametrize("count", [0, -1, 1000])
def test_an_impossible_number_of_hosts_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match="hosts can be made"):
        Hosts(count)
