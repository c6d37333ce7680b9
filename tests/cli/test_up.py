"""`up`, `meta` and `node` as processes: how they start, how they end, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import PATIENCE_S, Up, eventually, memfabric, run_cli, running

pytestmark = pytest.mark.processes

StartUp = Callable[..., Up]


class Part:
    """A `meta` or `node` of its own."""

    def __init__(self, work: Path, *arguments: str) -> None:
        self.ready_file = work / f"part-{time.monotonic_ns()}.json"
        command = memfabric(*arguments, "--ready-file", str(self.ready_file))
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def wait_ready(self) -> dict[str, object]:
        """What the ready file says."""
        eventually(lambda: self.ready_file.exists() or self.process.poll() is not None, "it is ready")
        assert self.ready_file.exists(), self.end()
        document: dict[str, object] = json.loads(self.ready_file.read_text())
        return document

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Signal it, wait for its end; exit code and standard error."""
        if number is not None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, errors


@pytest.fixture
def start_part(tmp_path: Path) -> Iterator[Callable[..., Part]]:
    """Starts parts that are gone after the test."""
    parts: list[Part] = []

    def start(*arguments: str) -> Part:
        parts.append(Part(tmp_path, *arguments))
        return parts[-1]

    yield start
    for part in parts:
        if part.process.poll() is None:
            part.process.kill()
            part.end()


def region_files(directory: Path) -> list[str]:
    """Names of the regions that lie there."""
    return sorted(path.name for path in directory.iterdir())


# --- a pool ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything_cleanly(start_up: StartUp, regions: Path, number: int) -> None:
    pool = start_up().wait_ready()
    assert sorted(pool.pids) == ["meta", "node-0", "node-1"]
    assert len(region_files(regions)) == 8
    assert pool.stop(number) == 0, pool.errors()
    assert not any(running(pid) for pid in pool.pids.values())
    assert region_files(regions) == []
    assert not pool.ready_file.exists()
    errors = pool.errors()
    assert "The pool is ready." in errors
    assert f"memfabric status --address {pool.address}" in errors
    assert "Error" not in errors and "Traceback" not in errors


def test_ctrl_c_at_a_terminal_reaches_only_up(start_up: StartUp, regions: Path) -> None:
    """The processes are in sessions of their own, so that they are stopped in order and not all at once."""
    pool = start_up().wait_ready()
    assert all(os.getsid(pid) == pid for pid in pool.pids.values())
    assert pool.stop(signal.SIGINT) == 0


def test_a_signal_while_starting_ends_everything(start_up: StartUp, regions: Path) -> None:
    pool = start_up()
    eventually(lambda: children_of(pool.process.pid), "a first process has started")
    found = children_of(pool.process.pid)
    assert pool.stop(signal.SIGTERM) == 0, pool.errors()
    assert not any(running(pid) for pid in found)
    assert region_files(regions) == []
    assert not pool.ready_file.exists()


def children_of(pid: int) -> list[int]:
    """Process ids of its children."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def test_killing_up_ends_its_processes_cleanly(start_up: StartUp, regions: Path) -> None:
    pool = start_up().wait_ready()
    pool.process.kill()
    assert pool.end() == -signal.SIGKILL
    eventually(lambda: not any(running(pid) for pid in pool.pids.values()), "the processes end by themselves")
    assert region_files(regions) == []


def test_a_killed_node_is_reported_and_the_rest_goes_on(start_up: StartUp, regions: Path) -> None:
    pool = start_up().wait_ready()
    assert pool.run("namespace", "create", "x", "--block-size", "4KiB").exit_code == 0
    os.kill(pool.pids["node-0"], signal.SIGKILL)
    eventually(lambda: "node-0 died (killed by SIGKILL)" in pool.errors(), "the death is reported")
    eventually(lambda: "Freed 4 regions of shared memory" in pool.errors(), "its shared memory is freed")
    assert len(region_files(regions)) == 4

    def states() -> dict[str, str]:
        nodes = pool.json("node", "list")
        assert isinstance(nodes, list)
        return {node["name"]: node["state"] for node in nodes}

    eventually(lambda: states() == {"node-0": "dead", "node-1": "active"}, "the server knows")
    assert pool.stop() == 1, "the exit code tells that something died"


def test_a_node_that_was_stopped_is_no_failure(start_up: StartUp) -> None:
    pool = start_up().wait_ready()
    os.kill(pool.pids["node-1"], signal.SIGTERM)
    eventually(lambda: "node-1 was stopped; its blocks are gone, 1 node left." in pool.errors(), "it is reported")
    assert pool.stop() == 0


def test_without_its_server_the_pool_ends(start_up: StartUp, regions: Path) -> None:
    pool = start_up().wait_ready()
    os.kill(pool.pids["meta"], signal.SIGKILL)
    assert pool.end() == 1
    assert "Error: the metadata server died (killed by SIGKILL), so the pool stops" in pool.errors()
    assert not any(running(pid) for pid in pool.pids.values())
    assert region_files(regions) == []


def test_a_node_that_hangs_is_killed_at_the_second_signal(start_up: StartUp, regions: Path) -> None:
    pool = start_up().wait_ready()
    os.kill(pool.pids["node-0"], signal.SIGSTOP)
    pool.process.send_signal(signal.SIGINT)
    eventually(lambda: "Stopping" in pool.errors(), "it is stopping")
    pool.process.send_signal(signal.SIGINT)
    assert pool.end() == 1
    assert re.search("node-0.* did not end when asked and had to be killed", pool.errors())
    assert not any(running(pid) for pid in pool.pids.values())
    assert region_files(regions) == []


def test_a_taken_port_is_refused(start_up: StartUp, regions: Path) -> None:
    pool = start_up().wait_ready()
    second = start_up("--address", pool.address)
    assert second.end() == 1
    assert f"meta did not start (exit code 1): cannot bind {pool.address}" in second.errors()
    assert "Traceback" not in second.errors()
    assert not second.ready_file.exists()
    assert pool.stop() == 0


def test_memory_that_cannot_be_had_is_refused(start_up: StartUp, regions: Path) -> None:
    pool = start_up("--memory", "100000GiB", "--region", "1GiB")
    assert pool.end() == 1
    assert "allows only" in pool.errors()
    assert region_files(regions) == []


def test_impossible_regions_are_refused_with_the_nodes_words(start_up: StartUp, regions: Path) -> None:
    pool = start_up("--region", "5000")
    assert pool.end() == 1
    assert "did not start (exit code 2): region size must be at least 1 MiB" in pool.errors()
    assert region_files(regions) == []


def test_a_ready_file_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for command in ("up", "meta", "node"):
        result = run_cli(command, "--ready-file", str(tmp_path / "no" / "where"))
        assert result.exit_code == 2
        assert "is not a directory" in result.stderr


def test_namespaces_survive_with_a_state_directory(start_up: StartUp, tmp_path: Path) -> None:
    for _ in range(2):
        pool = start_up("--state-dir", str(tmp_path / "state")).wait_ready()
        assert pool.run("namespace", "create", "kept", "--block-size", "4KiB").exit_code == 0
        assert pool.stop() == 0
    pool = start_up("--state-dir", str(tmp_path / "state")).wait_ready()
    assert "kept" in pool.run("namespace", "list").stdout
    assert pool.stop() == 0


# --- parts -------------------------------------------------------------------------------------------------------


def test_meta_and_node_by_hand(start_part: Callable[..., Part], regions: Path) -> None:
    meta = start_part("meta", "--address", "auto")
    address = str(meta.wait_ready()["address"])
    node = start_part("node", "--name", "solo", "-a", address, "--memory", "16MiB", "--directory", str(regions))
    assert node.wait_ready() == {"name": "solo", "server": address, "pid": node.process.pid}
    assert "solo" in run_cli("-a", address, "node", "list").stdout
    assert len(region_files(regions)) == 8

    code, errors = node.end(signal.SIGINT)
    assert code == 0, errors
    assert f"Node solo lends 16 MiB to {address}" in errors
    assert region_files(regions) == []
    code, errors = meta.end(signal.SIGINT)
    assert code == 0, errors
    assert f"Metadata server is ready at {address}" in errors
    assert "Traceback" not in errors


def test_two_nodes_with_one_name(start_part: Callable[..., Part], regions: Path) -> None:
    address = str(start_part("meta", "--address", "auto").wait_ready()["address"])
    options = ["--name", "twin", "-a", address, "--memory", "4MiB", "--directory", str(regions)]
    first = start_part("node", *options)
    first.wait_ready()
    before = region_files(regions)
    second = subprocess.run(memfabric("node", *options, "--timeout", "4s"), capture_output=True, text=True)
    assert second.returncode == 1
    assert "twin" in second.stderr.splitlines()[-1]
    assert second.stderr.splitlines()[-1].startswith("Error: ")
    assert region_files(regions) == before, "the first node's memory is untouched, the second's is gone"
    assert first.end(signal.SIGTERM)[0] == 0


def test_a_node_without_a_server(regions: Path) -> None:
    options = ["--memory", "4MiB", "--directory", str(regions), "-a", "tcp://127.0.0.1:1", "--timeout", "300ms"]
    done = subprocess.run(memfabric("node", *options), capture_output=True, text=True)
    assert done.returncode == 1
    assert "Error: no metadata server answered at tcp://127.0.0.1:1 within" in done.stderr
    assert region_files(regions) == []


def test_what_a_killed_node_left_is_cleaned_at_the_next_start(start_part: Callable[..., Part], regions: Path) -> None:
    address = str(start_part("meta", "--address", "auto").wait_ready()["address"])
    options = ["-a", address, "--memory", "4MiB", "--directory", str(regions)]
    killed = start_part("node", "--name", "a", *options)
    killed.wait_ready()
    killed.end(signal.SIGKILL)
    left = region_files(regions)
    assert left, "a killed node cannot clean up"
    after = start_part("node", "--name", "b", *options)
    after.wait_ready()
    assert not set(left) & set(region_files(regions))
    assert after.end(signal.SIGTERM)[0] == 0


def test_a_taken_port_is_refused_by_meta(start_part: Callable[..., Part]) -> None:
    address = str(start_part("meta", "--address", "auto").wait_ready()["address"])
    done = subprocess.run(memfabric("meta", "-a", address), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: cannot bind {address}")


def test_an_address_for_everybody_needs_insecure() -> None:
    done = subprocess.run(memfabric("meta", "-a", "tcp://0.0.0.0:auto"), capture_output=True, text=True)
    assert done.returncode == 2
    assert "--insecure" in done.stderr


def test_watch_survives_a_restart_of_the_server(start_part: Callable[..., Part], tmp_path: Path) -> None:
    first = start_part("meta", "--address", "auto")
    address = str(first.wait_ready()["address"])
    command = memfabric("status", "-a", address, "--watch", "100ms", "--timeout", "500ms")
    output = tmp_path / "watch"
    with output.open("wb") as stream:
        watching = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        eventually(lambda: output.read_text().count("No node has joined") >= 2, "it shows the status")
        assert first.end(signal.SIGTERM)[0] == 0
        eventually(lambda: "trying again" in output.read_text(), "it says that the server is away")
        shown = output.read_text().count("No node has joined")
        second = start_part("meta", "--address", address)
        second.wait_ready()
        eventually(lambda: output.read_text().count("No node has joined") > shown, "it goes on")
    finally:
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE_S) == 0
    assert "Traceback" not in output.read_text()


def test_the_default_directory_is_clean_afterwards(tmp_path: Path) -> None:
    """Other pools of this machine may have regions there, so only what this node has open is looked at."""
    pool = Up(Path("/dev/shm"), tmp_path, "--nodes", "1", "--memory", "4MiB", "--region", "1MiB").wait_ready()
    try:
        maps = Path(f"/proc/{pool.pids['node-0']}/maps").read_text()
        files = {Path(line.split()[-1]) for line in maps.splitlines() if "/dev/shm/memfabric." in line}
        assert len(files) == 4
        assert all(file.exists() for file in files)
        assert pool.stop() == 0
        assert not any(file.exists() for file in files)
    finally:
        if pool.process.poll() is None:
            pool.kill_everything()


def test_a_pool_whose_output_nobody_reads_still_ends_cleanly(regions: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    options = ["--memory", "4MiB", "--region", "1MiB", "--directory", str(regions), "--ready-file", str(ready)]
    up = subprocess.Popen(memfabric("up", "-a", "auto", *options), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert up.stderr is not None and up.stdout is not None
        up.stderr.close()
        up.stdout.close()
        eventually(lambda: ready.exists() or up.poll() is not None, "it is ready")
        assert len(region_files(regions)) == 8
        up.terminate()
        assert up.wait(PATIENCE_S) == 0
    finally:
        if up.poll() is None:
            up.terminate()
            up.wait(PATIENCE_S)
    assert region_files(regions) == []


def test_nohup_is_respected(start_up: StartUp) -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # children inherit it
    try:
        pool = start_up().wait_ready()
    finally:
        signal.signal(signal.SIGHUP, old)
    pool.process.send_signal(signal.SIGHUP)
    assert pool.run("status").exit_code == 0
    assert pool.stop(signal.SIGTERM) == 0


def test_a_ready_file_of_a_killed_pool_is_not_believed(start_up: StartUp) -> None:
    pool = start_up().wait_ready()
    pool.process.kill()
    pool.end()
    eventually(lambda: not any(running(pid) for pid in pool.pids.values()), "the processes end by themselves")
    assert pool.ready_file.exists()
    again = start_up("--ready-file", str(pool.ready_file), "--region", "1")
    assert again.end() == 1
    assert not pool.ready_file.exists()


def test_memory_is_lent_in_whole_regions_and_so_it_is_said(start_up: StartUp, regions: Path) -> None:
    pool = start_up("--memory", "5MiB", "--region", "2MiB", "--nodes", "1").wait_ready()
    assert "memory            4 MiB: 1 node of 4 MiB in regions of 2 MiB" in pool.errors()
    assert len(region_files(regions)) == 2
    assert pool.stop() == 0
