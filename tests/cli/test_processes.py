"""The supervisor: what children report, log and how they end is told in order, and none outlives it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfabric.processes import Child, Event, Exited, Logged, Reported, Signalled, Supervisor
from tests.cli.conftest import eventually, running

pytestmark = pytest.mark.processes

PRELUDE = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from memfabric.processes import Reporter, die_with_parent
parent, fd = int(sys.argv[-3]), int(sys.argv[-1])
"""


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    """A supervisor whose children are scripts: a stand-in for the interpreter runs the script that it is given."""
    runner = tmp_path / "python"
    runner.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} "$@"\n')
    runner.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(runner))
    with Supervisor() as made:
        yield made


def script(tmp_path: Path, name: str, body: str) -> list[str]:
    """A child that does `body`; `parent` and `fd` are what the supervisor gave it."""
    path = tmp_path / f"{name}.py"
    root = str(Path(__file__).resolve().parents[2])
    path.write_text(PRELUDE.format(root=root) + body)
    return [str(path)]


def until_exit(supervisor: Supervisor, child: Child) -> list[Event]:
    """Everything that happens until the child has ended."""
    events: list[Event] = []
    while not any(isinstance(event, Exited) and event.child is child for event in events):
        events += supervisor.wait(60)
    return events


def test_reports_and_lines_come_before_the_end(supervisor: Supervisor, tmp_path: Path) -> None:
    body = """
reporter = Reporter(fd)
for i in range(3):
    reporter.report(step=i)
print("out")
print("err", file=sys.stderr)
sys.stdout.write("no newline at the end")
sys.exit(7)
"""
    child = supervisor.start("one", script(tmp_path, "one", body))
    events = until_exit(supervisor, child)
    assert [event.report["step"] for event in events if isinstance(event, Reported)] == [0, 1, 2]
    assert {event.line for event in events if isinstance(event, Logged)} == {"out", "err", "no newline at the end"}
    assert isinstance(events[-1], Exited)
    assert (child.status, child.describe_end()) == (7, "exit code 7")
    assert list(child.tail)[-1] == "no newline at the end"


def test_a_flood_of_lines_is_told_whole(supervisor: Supervisor, tmp_path: Path) -> None:
    body = 'sys.stdout.write("".join(f"{i}\\n" for i in range(200_000)))'
    events = until_exit(supervisor, supervisor.start("flood", script(tmp_path, "flood", body)))
    assert [event.line for event in events if isinstance(event, Logged)] == [str(i) for i in range(200_000)]


def test_a_line_without_an_end_does_not_fill_memory(supervisor: Supervisor, tmp_path: Path) -> None:
    body = 'sys.stdout.write("x" * (3 << 20))'
    events = until_exit(supervisor, supervisor.start("endless", script(tmp_path, "endless", body)))
    lines = [event.line for event in events if isinstance(event, Logged)]
    assert sum(map(len, lines)) == 3 << 20
    assert len(lines) >= 2


def test_garbage_on_the_report_pipe_is_shown_as_text(supervisor: Supervisor, tmp_path: Path) -> None:
    body = 'os.write(fd, b"not json\\n[1, 2]\\n\\xff\\xfe\\n")'
    events = until_exit(supervisor, supervisor.start("garbage", script(tmp_path, "garbage", body)))
    assert not [event for event in events if isinstance(event, Reported)]
    assert [event.line for event in events if isinstance(event, Logged)] == ["not json", "[1, 2]", "\ufffd\ufffd"]


def test_stop_asks_first_and_kills_what_does_not_end(supervisor: Supervisor, tmp_path: Path) -> None:
    polite = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
Reporter(fd).report(ready=True)
signal.pause()
"""
    stubborn = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Reporter(fd).report(ready=True)
while True: time.sleep(1)
"""
    children = [
        supervisor.start("polite", script(tmp_path, "polite", polite)),
        supervisor.start("stubborn", script(tmp_path, "stubborn", stubborn)),
    ]
    ready = 0
    while ready < 2:
        ready += sum(isinstance(event, Reported) for event in supervisor.wait(60))
    killed = supervisor.stop(children, 0.5, lambda event: None)
    assert [child.name for child in killed] == ["stubborn"]
    assert [child.status for child in children] == [0, -signal.SIGKILL]
    assert children[1].describe_end() == "killed by SIGKILL"


def test_a_second_signal_is_a_kill(supervisor: Supervisor, tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGTERM, lambda *_: os.kill(parent, signal.SIGINT))
Reporter(fd).report(ready=True)
while True: time.sleep(1)
"""
    child = supervisor.start("stubborn", script(tmp_path, "stubborn", body))
    while not any(isinstance(event, Reported) for event in supervisor.wait(60)):
        pass
    told: list[Event] = []
    assert supervisor.stop([child], 1e6, told.append) == [child]
    assert Signalled(signal.SIGINT) in told


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_leaving_the_context_leaves_no_child(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)]
    descriptors = open_descriptors()
    with Supervisor() as supervisor:
        child = supervisor.start("meta", ["meta", "--address", "tcp://127.0.0.1:auto"])
    assert not running(child.pid)
    assert child.status == -signal.SIGKILL
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)]
    assert after == before
    assert open_descriptors() == descriptors


def test_a_child_of_a_parent_that_is_gone_does_not_start(tmp_path: Path) -> None:
    """It finds that its parent is not who started it, and ends before it claims anything."""
    ready = tmp_path / "ready"
    arguments = ["meta", "--address", "auto", "--parent-pid", "1", "--ready-file", str(ready)]
    done = subprocess.run([sys.executable, "-m", "memfabric", *arguments], capture_output=True, timeout=120)
    assert done.returncode == 1
    assert not ready.exists()


def test_a_child_dies_with_a_killed_parent(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from memfabric.processes import Reported, Supervisor
with Supervisor() as supervisor:
    child = supervisor.start("meta", ["meta", "--address", "tcp://127.0.0.1:auto"])
    while not any(isinstance(event, Reported) for event in supervisor.wait()): pass
    open({str(pids)!r}, "w").write(str(child.pid))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120)
    assert done.returncode == -signal.SIGKILL
    pid = int(pids.read_text())
    eventually(lambda: not running(pid), "the child of the killed parent ends")
