"""`memfabric perf` as people call it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from memfabric.perf.results import load, save
from tests.cli.conftest import PATIENCE_S, eventually, memfabric, run_cli, running
from tests.perf_tool.conftest import noisy, point, record

Make = Callable[..., dict[str, Any]]
SMALL = ("--block-size", "16KiB", "--batch", "1,4", "--repeats", "2", "--point-time", "0.1s", "--working-set", "1MiB")


def test_help_names_every_command() -> None:
    said = run_cli("perf", "--help")
    assert said.exit_code == 0
    for name in ("run", "show", "compare", "presets"):
        assert name in said.stdout
        assert "Examples:" in run_cli("perf", name, "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--op", "reed"), "no operation 'reed'"),
        (("--block-size", "64QiB"), "unknown unit"),
        (("--block-size", "4KiB:1MiB"), "FROM:TO:xFACTOR"),
        (("--batch", "many"), "'many' is not a whole number"),
        (("--transport", "pigeon"), "no transport 'pigeon'"),
        (("--transport", "ucx:tls"), "NAME:OPTION=VALUE"),
        (("--preset", "llama-4"), "did you mean"),
        (("--preset", "llama-3-8b", "--block-size", "4KiB"), "exclude each other"),
        (("--preset", "llama-3-8b", "--tp", "5"), "8 KV heads"),
        (("--memory", "1MiB"), "no point fits into the memory"),
        (("--total-time", "1ms"), "do not fit"),
        (("--op", "get", "--pool", "http://x"), "not an address"),
        (("--plot", "/nowhere/x.png"), "not a directory"),
    ],
)
def test_wrong_calls_are_refused_before_anything_starts(arguments: tuple[str, ...], says: str) -> None:
    done = run_cli("perf", "run", *arguments)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stdout == ""


def test_a_dry_run_lists_points_and_starts_nothing() -> None:
    done = run_cli("perf", "run", "--dry-run", "--op", "all", *SMALL)
    assert done.exit_code == 0
    assert "read 16 KiB x 4 over shm" in done.stdout and "match x 1 over shm" in done.stdout
    assert "12 points, 2 repeats each" in done.stdout


def test_presets_as_block_sizes() -> None:
    shape = ("--tp", "8", "--dtype", "fp8", "--block-tokens", "64")
    done = run_cli("perf", "run", "--dry-run", "--preset", "llama-3-70b", *shape, "--batch", "1")
    assert "read 1.25 MiB x 1 over shm" in done.stdout  # 64 x 2 x 80 x 1 x 128
    listed = json.loads(run_cli("perf", "presets", "llama-3-70b", *shape, "--json").stdout)
    assert listed[0]["block_bytes"] == 64 * 2 * 80 * 1 * 128 and listed[0]["formula"] == "2 x 80 x 8 x 128 x type"


def test_presets_table_tells_what_does_not_go() -> None:
    done = run_cli("perf", "presets", "--tp", "16")
    assert done.exit_code == 0 and "phi-4" in done.stdout and "10 KV heads" in done.stdout
    assert run_cli("perf", "presets", "phi-4", "--tp", "16").exit_code == 2
    assert run_cli("perf", "presets", "--dtype", "int2").exit_code == 2
    assert run_cli("perf", "presets", "--block-tokens", "0", "phi-4").exit_code == 2


@pytest.mark.processes
def test_a_sweep_writes_everything(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / f"x.{name}" for name in ("out", "csv", "plot", "html")}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    done = run_cli("perf", "run", "--op", "read,match", *SMALL, "--directory", str(shared), *options)
    assert done.exit_code == 0, done.output
    assert "about" in done.stderr and "memcpy" in done.stdout and "reserve" not in done.stdout
    document = load(files["out"])
    assert len(document["points"]) == 4 and document["sweep"]["seed"] == 1
    assert files["csv"].read_text().count("\n") == 5
    assert files["plot"].read_bytes().startswith(b"\x89PNG")
    assert files["html"].read_text().startswith("<!doctype html>")
    again = run_cli("perf", "show", str(files["out"]), "--csv", str(tmp_path / "again.csv"))
    assert again.exit_code == 0 and again.stdout == done.stdout
    assert (tmp_path / "again.csv").read_text() == files["csv"].read_text()
    assert json.loads(run_cli("perf", "show", str(files["out"]), "--json").stdout) == document


@pytest.mark.processes
def test_results_are_shown_even_where_they_cannot_be_kept(shared: Path, tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    options = ("--op", "read", *SMALL, "--directory", str(shared), "--csv", str(tmp_path / "x.csv"))
    done = run_cli("perf", "run", *options, "--out", str(full))
    assert done.exit_code == 1 and "No space left" in done.stderr
    assert "memcpy" in done.stdout and (tmp_path / "x.csv").exists()


@pytest.mark.processes
def test_what_cannot_be_measured_makes_the_exit_code_one(shared: Path) -> None:
    options = ("--op", "get", *SMALL, "--pool", "tcp://127.0.0.1:1", "--directory", str(shared), "--json")
    done = run_cli("perf", "run", *options)
    assert done.exit_code == 1
    assert all("no metadata server answered" in each["problem"] for each in json.loads(done.stdout)["points"])


def start(shared: Path, out: Path) -> subprocess.Popen[bytes]:
    """A long sweep, in its first point."""
    options = ["--op", "read,get", "--block-size", "16KiB", "--batch", "1,2,4,8", "--point-time", "5s"]
    command = memfabric("perf", "run", *options, "--directory", str(shared), "--out", str(out), "--json")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    eventually(lambda: len(children(process.pid)) == 3 and any(shared.iterdir()), "owner, client and stream run")
    time.sleep(1.5)
    return process


def children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_sweep_and_keeps_what_was_measured(shared: Path, tmp_path: Path, number: int) -> None:
    process = start(shared, tmp_path / "x.json")
    pids = children(process.pid)
    process.send_signal(number)
    out, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors.decode()
    document = load(tmp_path / "x.json")
    assert document == json.loads(out) and document["stopped"] == "interrupted"
    assert not any(map(running, pids))


@pytest.mark.processes
def test_a_sweep_that_is_killed_takes_its_processes_along(shared: Path, tmp_path: Path) -> None:
    process = start(shared, tmp_path / "x.json")
    pids = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)
    eventually(lambda: not any(map(running, pids)), "all processes end")
    assert not (tmp_path / "x.json").exists()


def test_comparing(document: Make, tmp_path: Path) -> None:
    old, new, path = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "other.json"
    points = [point(batch=batch) for batch in (1, 2, 3)]
    save(document(*(record(each, noisy(1e10, 0.01, 1)) for each in points)), old)
    changed = [record(each, noisy(1e10 * factor, 0.01, 2)) for each, factor in zip(points, (1, 0.5, 2), strict=True)]
    save(document(*changed), new)
    done = run_cli("perf", "compare", str(old), str(new))
    assert done.exit_code == 0
    assert "1 faster, 1 slower, 1 no difference shown, 0 too noisy" in done.stdout
    assert done.stdout.index("slower") < done.stdout.index("faster")
    assert run_cli("perf", "compare", str(old), str(new), "--fail-on-regression").exit_code == 3
    assert run_cli("perf", "compare", str(old), str(old), "--fail-on-regression").exit_code == 0
    found = json.loads(run_cli("perf", "compare", str(old), str(new), "--json").stdout)
    assert found["counts"] == {"faster": 1, "slower": 1, "no difference shown": 1, "too noisy": 0}
    path.write_text('{"schema": "memfabric-bench/1"}')
    assert run_cli("perf", "compare", str(old), str(path)).exit_code == 2
    assert run_cli("perf", "compare", str(old), str(tmp_path / "missing")).exit_code == 2
    assert run_cli("perf", "compare", str(old), str(new), "--effect", "0").exit_code == 2
