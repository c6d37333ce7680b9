"""``memfabric doctor``: what it prints, what it ends with."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from memfabric.cli.doctor import show
from memfabric.doctor import Finding, Report, Severity, TransportVerdict
from tests.cli.conftest import PATIENCE_S, Up, memfabric, run_cli

NOWHERE = "tcp://127.0.0.1:1"
FIX = "systemctl edit SERVICE # [Service] LimitMEMLOCK=infinity, a line longer than many terminals are wide"
REPORT = Report(
    [
        Finding("locked memory", Severity.PROBLEM, "limited to 8 MiB", "regions are locked " * 8, (FIX,)),
        Finding("frequency", Severity.WARNING, "governor powersave"),
        Finding("RDMA", Severity.INFO, "no RDMA adapter [bold]or so[/bold]"),
        Finding("clock", Severity.OK, "source tsc"),
    ],
    [
        TransportVerdict("shm", True, "memory copy"),
        TransportVerdict("ucx", True, "UCX 1.22.0", "there is no RDMA adapter"),
        TransportVerdict("verbs", False, "there is no libibverbs"),
    ],
)


def printed(width: int, *, colour: bool = False) -> str:
    stream = io.StringIO()
    show(REPORT, Console(file=stream, width=width, force_terminal=colour, highlight=False, emoji=False))
    return stream.getvalue()


@pytest.mark.parametrize("width", [40, 80, 140, 500])
def test_text_fits_the_width_and_commands_stay_whole(width: int) -> None:
    lines = printed(width).splitlines()
    assert f"    {FIX}" in lines
    assert all(len(line) <= width for line in lines if FIX not in line)
    assert all(line == line.rstrip() for line in lines)


def test_the_groups_stand_in_the_order_of_their_weight() -> None:
    text = printed(140)
    places = [text.index(title) for title in ("Transports", "To mend", "Worth knowing", "In order")]
    assert places == sorted(places)
    mend = text[places[1] : places[2]]
    assert "limited to 8 MiB" in mend
    assert "governor powersave" in mend
    assert "usable, but slower because there is no RDMA adapter" in text
    assert "not usable because there is no libibverbs" in text
    assert text.endswith("1 problem, 1 warning\n")
    assert "[bold]or so[/bold]" in text  # what a host says is not markup


def test_colour_changes_no_word() -> None:
    coloured = printed(80, colour=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == printed(80)


def test_this_host() -> None:
    result = run_cli("doctor")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Transports\n")
    assert "shm" in result.stdout
    assert result.stderr == ""


def test_json() -> None:
    result = run_cli("doctor", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["problems"] == sum(each["severity"] == "problem" for each in document["findings"])
    assert {"shm", "ucx"} <= {each["name"] for each in document["transports"]}


@pytest.mark.parametrize(("strict", "code"), [([], 0), (["--strict"], 1)])
def test_a_problem_counts_where_it_is_said_to(strict: list[str], code: int, tmp_path: Path) -> None:
    result = run_cli("doctor", "--json", "--directory", str(tmp_path / "nowhere"), *strict)
    assert result.exit_code == code, result.output
    document = json.loads(result.stdout)
    assert document["problems"] >= 1
    assert not next(each for each in document["transports"] if each["name"] == "shm")["usable"]


def test_a_server_that_does_not_answer_is_a_problem() -> None:
    result = run_cli("doctor", "-a", NOWHERE, "--timeout", "100ms", "--strict")
    assert result.exit_code == 1
    assert f"no metadata server answered at {NOWHERE}" in result.stdout


def test_an_address_that_is_none_is_a_wrong_call() -> None:
    result = run_cli("doctor", "-a", "nowhere")
    assert result.exit_code == 2
    assert "is not an address" in result.stderr


def test_without_an_address_no_server_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMFABRIC_ADDRESS", raising=False)
    document = json.loads(run_cli("doctor", "--json").stdout)
    assert "pool" not in {finding["area"] for finding in document["findings"]}


@pytest.mark.processes
def test_a_pool_that_answers(pool: Up) -> None:
    result = pool.run("doctor", "--json")
    assert result.exit_code == 0, result.output
    (finding,) = (each for each in json.loads(result.stdout)["findings"] if each["area"] == "pool")
    assert finding["severity"] in ("ok", "warning")  # a warning where a busy machine takes its time
    assert "protocol 1; 2 nodes" in finding["what"]


@pytest.mark.processes
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_output_that_takes_only_ascii(encoding: str) -> None:
    done = subprocess.run(
        memfabric("doctor"),
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert done.stderr == b""
    assert done.stdout.isascii() == (encoding == "ascii")


@pytest.mark.processes
def test_on_a_terminal() -> None:
    """With its colours, and not in the way of what else the terminal does."""
    leader, follower = pty.openpty()
    try:
        child = subprocess.Popen(
            memfabric("doctor"),
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"},
        )
        os.close(follower)
        seen = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            seen += piece
        assert child.wait(PATIENCE_S) == 0
    finally:
        os.close(leader)
    assert b"\x1b[" in seen
    assert b"Traceback" not in seen
