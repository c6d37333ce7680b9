"""What the command line takes and refuses, without any pool."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from memfabric.cli import cli
from memfabric.cli.base import Settings, parse_key
from memfabric.cli.memory import default_memory_bytes, default_region_bytes
from memfabric.errors import UsageError
from tests.cli.conftest import memfabric, run_cli

MIB = 1 << 20
NOWHERE = "tcp://127.0.0.1:1"  # a privileged port on which nothing listens


def commands() -> list[list[str]]:
    """Every command and sub-command, as words."""
    found: list[list[str]] = [[]]
    for name, command in cli.commands.items():
        found.append([name])
        found += [[name, sub] for sub in getattr(command, "commands", {})]
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help(words: list[str]) -> None:
    result = run_cli(*words, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: memfabric")
    assert "Examples:" in result.stdout or words in ([], ["namespace"])


def test_every_command_stands_in_a_section_of_the_help() -> None:
    assert sorted(cli.list_commands(None)) == sorted(cli.commands)  # type: ignore[arg-type]


def test_version() -> None:
    result = run_cli("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("memfabric ")


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    heavy = ["numpy", "zmq", "rich", "msgspec", "torch", "transport", "memfabric.client", "memfabric.server"]
    code = f"import sys, memfabric.cli; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_command_names_the_nearest() -> None:
    result = run_cli("namespaces")
    assert result.exit_code == 2
    assert "Did you mean 'namespace'?" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "--frobnicate"], "No such option"),
        (["put", "-n", "demo"], "Missing argument 'FILE'"),
        (["ls"], "Missing option '-n'"),
        (["up", "--nodes", "0"], "0 is not in the range"),
        (["up", "--memory", "plenty"], "'plenty' is not a size"),
        (["meta", "--heartbeat", "5 parsecs"], "unknown unit 'parsecs'"),
        (["status", "--watch", "1ms"], "at least 10ms"),
        (["explain", "-n", "demo", "abc"], "it has 3 hexadecimal digits, a key has 32"),
        (["explain", "-n", "demo", "0x" + "0" * 30], "character 2 is 'x'"),
        (["rm", "-n", "demo", "z" * 32], "character 1 is 'z'"),
        (["-a", "nowhere", "status"], "is not an address"),
        (["-a", "tcp://host:70000", "status"], "is not an address"),
        (["-a", "http://host:80", "status"], "is not an address"),
        (["-a", "tcp://host:auto", "status"], "has no port"),
        (["namespace", "create", "x"], "say --block-size, or"),
        (["namespace", "create", "x", "--layers", "2"], "with --dtype, --kv-heads, --head-dim as well"),
        (["namespace", "create", "x", "--policy", "fifo"], "'fifo' is not one of"),
        (["put", "-n", "x", "--key", "0" * 32, "--tokens", "-", "-"], "exclude each other"),
        (["put", "-n", "x", "--tokens", "-", "-"], "only one of FILE and --tokens"),
        (["get", "-n", "x"], "no key given"),
        (["get", "-n", "x", "--json", "0" * 32], "the bytes need a file"),
        (["completion", "tcsh"], "'tcsh' is not one of"),
    ],
)
def test_wrong_calls_say_why(arguments: list[str], words: str) -> None:
    result = run_cli(*arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_block_size_that_contradicts_the_model_is_refused() -> None:
    model = ["--dtype", "bfloat16", "--layers", "2", "--kv-heads", "2", "--head-dim", "8"]
    result = run_cli("namespace", "create", "x", *model, "--block-size", "1KiB")
    assert result.exit_code == 2
    assert "2 layers x 2 (K, V) x 2 heads x 8 x 16 tokens x bfloat16 is 2048" in result.stderr


@pytest.mark.parametrize("text", ["00112233445566778899aabbccddeeff", " 00112233445566778899AABBCCDDEEFF\n"])
def test_keys_are_read(text: str) -> None:
    assert parse_key(text) == bytes.fromhex("00112233445566778899aabbccddeeff")


def test_a_long_wrong_key_is_not_repeated_whole() -> None:
    with pytest.raises(UsageError) as caught:
        parse_key("0" * 5000)
    assert "5000 hexadecimal digits" in str(caught.value)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("given", "bound"),
    [
        (None, "tcp://127.0.0.1:7170"),
        ("auto", "tcp://127.0.0.1:0"),
        ("tcp://127.0.0.1:auto", "tcp://127.0.0.1:0"),
        ("tcp://0.0.0.0:*", "tcp://0.0.0.0:0"),
        ("localhost:7000", "tcp://localhost:7000"),
        ("tcp://[::1]:7000", "tcp://[::1]:7000"),
        ("ipc:///tmp/pool", "ipc:///tmp/pool"),
    ],
)
def test_addresses_to_serve_at(given: str | None, bound: str) -> None:
    assert Settings(address=given).bind == bound


def test_options_count_from_specific_to_general(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment, then before the command, then after it; told apart by the address in the error."""

    def asked(*arguments: str) -> str:
        result = run_cli("--timeout", "50ms", *arguments)
        assert result.exit_code == 1, result.output
        return result.stderr

    monkeypatch.setenv("MEMFABRIC_ADDRESS", "tcp://127.0.0.1:2")
    assert "tcp://127.0.0.1:2 " in asked("status")
    assert "tcp://127.0.0.1:3 " in asked("-a", "tcp://127.0.0.1:3", "status")
    assert "tcp://127.0.0.1:4 " in asked("-a", "tcp://127.0.0.1:3", "status", "-a", "tcp://127.0.0.1:4")
    assert "tcp://127.0.0.1:4 " in asked("node", "-a", "tcp://127.0.0.1:4", "list")


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["node", "list"],
        ["node", "drain", "node-0"],
        ["namespace", "list"],
        ["namespace", "create", "x", "--block-size", "4KiB"],
        ["namespace", "delete", "x", "--yes"],
        ["ls", "-n", "x"],
        ["get", "-n", "x", "-o", "/dev/null", "0" * 32],
        ["rm", "-n", "x", "0" * 32],
        ["explain", "-n", "x", "0" * 32],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_without_a_server_commands_end_within_the_deadline(arguments: list[str]) -> None:
    result = run_cli("-a", NOWHERE, "--timeout", "100ms", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: no metadata server answered at {NOWHERE} within 0.1 s")
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback() -> None:
    result = run_cli("-a", NOWHERE, "--timeout", "50ms", "--debug", "status")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "UnavailableError" in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    result = run_cli("completion", shell)
    assert result.exit_code == 0
    assert "_MEMFABRIC_COMPLETE" in result.stdout


def test_completion_completes() -> None:
    """What the scripts ask the program for."""
    done = subprocess.run(
        memfabric(),
        env={"_MEMFABRIC_COMPLETE": "bash_complete", "COMP_WORDS": "memfabric na", "COMP_CWORD": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["plain,namespace"]


def test_the_default_memory_is_safe() -> None:
    for nodes in (1, 2, 8):
        one = default_memory_bytes(nodes=nodes)
        assert one % MIB == 0
        assert 16 * MIB <= one <= 1 << 30
        assert 1 * MIB <= default_region_bytes(one) <= one
    assert default_region_bytes(3 * MIB) == MIB
    assert default_region_bytes(1 << 40) == 1 << 30


def test_more_memory_than_there_is_is_refused_at_once() -> None:
    for command in (["up"], ["node"]):
        result = run_cli(*command, "--memory", "1000000GiB")
        assert result.exit_code == 1
        assert "allows only" in result.stderr
        assert "nothing was started" in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="the extra `demo` is installed")
def test_the_demo_without_its_extra_says_how_to_get_it(tmp_path: Path) -> None:
    result = run_cli("demo", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "pip install 'memfabric[demo]'" in result.stderr
    assert not (tmp_path / "out").exists()
