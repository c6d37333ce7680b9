"""`python -m perf.fabric`: the pool between hosts over UCX and TCP, against a plain socket stream on the same cable.

The hosts are network namespaces of this machine (`memfabric.testing.hosts`), so both ends share its processors: figures
are ratios between neighbouring turns, never speeds of a network. Needs root.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

import memfabric
import transport
from memfabric import NamespaceSpec
from memfabric.client import AdminClient
from memfabric.perf import machine
from memfabric.perf.blocks import FreshKeys, aligned, fill
from memfabric.perf.stream import Stream, far_end
from memfabric.testing.hosts import Host, Hosts
from perf import report, targets
from perf.plan import GIB, KIB, MIB, size_text
from perf.timing import ratio, summary, take_turns, timed

SCHEMA = "memfabric-fabric/1"
SHAPES = ((64 * KIB, 16), (64 * KIB, 128), (256 * KIB, 64), (MIB, 1), (MIB, 16), (MIB, 64))
"""(block_bytes, batch)."""
SMALL_BYTES, SMALL_BATCH = 4 * KIB, 256
NODE_BYTES = 768 * MIB
START_S = 60.0
LEAST_TURNS, MOST_TURNS = 5, 400


@click.command()
@click.option("--quick", is_flag=True, help="Short: shows that everything runs; its figures mean little.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/fabric"),
    show_default=True,
    help="Where fabric.json goes.",
)
def main(quick: bool, out: Path) -> None:
    """Measure the pool between hosts, as ratios to limits measured in the same run. Never fails on time."""
    console = Console()
    begin_s = time.monotonic()

    def tell(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - begin_s:5.0f} s[/]  {line}", highlight=False, soft_wrap=True)

    budget_s = 0.3 if quick else 4.0
    small = _in_a_process(budget_s)
    tell(
        f"ucx on one host: {size_text(SMALL_BYTES)} x {SMALL_BATCH}: read {small['read']['us_per_block']} µs, "
        f"write {small['write']['us_per_block']} µs per block"
    )
    with Hosts(2) as hosts:
        records = _between_hosts(hosts, budget_s, tell)
    results = {"tcp": records, "same_host": small}
    verdicts = targets.judge_fabric(results)
    out.mkdir(parents=True, exist_ok=True)
    document = {
        "schema": SCHEMA,
        "quick": quick,
        "seconds": round(time.monotonic() - begin_s, 1),
        "machine": machine.facts(),
        "results": results,
        "targets": [verdict.document() for verdict in verdicts],
    }
    (out / "fabric.json").write_text(json.dumps(document, indent=1) + "\n")
    _show(console, results, verdicts)
    if quick:
        console.print("This was a quick run: its figures mean little.")
    console.print(f"Written: {out / 'fabric.json'}", soft_wrap=True)


# --- two hosts ---


def _between_hosts(hosts: Hosts, budget_s: float, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        far, near = hosts[0], hosts[1]
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memfabric-fabric-", dir="/dev/shm")))
        with far.inside():
            address, node_pid = stack.enter_context(_pool(far, directory))
            port = stack.enter_context(far_end(far.address))
        with near.inside():
            stream = stack.enter_context(Stream(far.address, port))
            records = []
            for block_bytes, batch in SHAPES:
                record = _measure_shape(address, node_pid, stream, block_bytes, batch, budget_s)
                records.append(record)
                tell(_describe(record))
        return records


@contextmanager
def _pool(host: Host, directory: Path) -> Iterator[tuple[str, int]]:
    """A metadata server and a node that lends over UCX; the server's address and the node's process id."""
    with ExitStack() as stack:
        meta_file, node_file = directory / "meta.json", directory / "node.json"
        command = [sys.executable, "-m", "memfabric"]
        meta = [*command, "meta", "--address", f"tcp://{host.address}:auto", "--insecure"]
        stack.enter_context(_process([*meta, "--ready-file", str(meta_file)], meta_file))
        address = json.loads(meta_file.read_text())["address"]
        node = [*command, "node", "--name", "node-0", "--address", address, "--memory", str(NODE_BYTES)]
        node += ["--region", str(NODE_BYTES // 2), "--directory", str(directory), "--transport", "ucx", "--insecure"]
        process = stack.enter_context(_process([*node, "--ready-file", str(node_file)], node_file))
        yield address, process.pid


@contextmanager
def _process(command: list[str], ready: Path) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ready.parent)
        try:
            end_s = time.monotonic() + START_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > end_s:
                    said = os.pread(log.fileno(), 1 << 16, 0).decode(errors="replace")
                    raise RuntimeError(f"{' '.join(command[2:5])} did not start:\n{said[-2000:]}")
                time.sleep(0.02)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(START_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _measure_shape(
    address: str, node_pid: int, stream: Stream, block_bytes: int, batch: int, budget_s: float
) -> dict[str, Any]:
    """Get and put of one shape, and streams of as many bytes, in turns."""
    name, size = f"fabric-{block_bytes}-{batch}", block_bytes * batch
    memory = aligned(size).reshape(batch, block_bytes)
    fill(memory.reshape(-1), seed=3)
    out = aligned(size).reshape(batch, block_bytes)
    fresh = FreshKeys(seed=4)
    with AdminClient(address) as admin:
        admin.namespace_create(NamespaceSpec(name=name, block_bytes=block_bytes, high_ratio=1.0, low_ratio=1.0))
    with memfabric.connect(address, namespace=name, timeout_s=30.0, transport="ucx") as client:
        keys = fresh(batch)
        client.put(keys, memory).raise_for_status()
        cpu_s = [0.0, 0]

        def get(_turn: int) -> int:
            before_s = machine.cpu_s(node_pid)
            taken = timed(lambda: _check(client.get(keys, out).ok, "get"))
            cpu_s[0] += machine.cpu_s(node_pid) - before_s
            cpu_s[1] += size
            return taken

        def put(_turn: int) -> int:
            some = fresh(batch)
            taken = timed(lambda: client.put(some, memory).raise_for_status())
            client.remove(some)
            return taken

        gets = take_turns({"get": get, "stream": lambda _: stream.fetch(out)}, budget_s, LEAST_TURNS, MOST_TURNS, 2)
        _check(bool((client.get(keys, out).ok) and (out == memory).all()), "the right bytes")
        puts = take_turns({"put": put, "stream": lambda _: stream.store(memory)}, budget_s, LEAST_TURNS, MOST_TURNS, 2)
    with AdminClient(address) as admin:
        admin.namespace_delete(name, force=True)
    return {
        "block_bytes": block_bytes,
        "batch": batch,
        "get": _against(gets, "get", size),
        "put": _against(puts, "put", size),
        "node_cpu_s_per_gib_read": round(cpu_s[0] / (cpu_s[1] / GIB), 4),
    }


def _against(samples: dict[str, list[int]], what: str, size: int) -> dict[str, Any]:
    return {
        "ratio": ratio(samples["stream"], samples[what]),
        "gb_s": round(size / float(np.median(samples[what])), 3),
        "stream_gb_s": round(size / float(np.median(samples["stream"])), 3),
        "time": summary(samples[what]),
    }


def _check(good: bool, what: str) -> None:
    if not good:
        raise RuntimeError(f"{what} failed; the figures would mean nothing")


# --- one host ---


def _in_a_process(budget_s: float) -> dict[str, Any]:
    """UCX remembers which network a process was in when it was loaded, so each network has a process."""
    code = f"import json; from perf.fabric import small_blocks; print(json.dumps(small_blocks({budget_s})))"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"small blocks: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def small_blocks(budget_s: float) -> dict[str, Any]:
    """Reads of many small blocks through UCX on one host, from another process's region, by a raw batch."""
    with _owner() as descriptor, transport.create("ucx") as client:
        handle = client.connect(descriptor, writable=True)
        local = aligned(SMALL_BYTES * SMALL_BATCH)
        at = np.arange(SMALL_BATCH, dtype=np.uint64) * SMALL_BYTES
        spread = np.random.default_rng(5).permutation(4 * SMALL_BATCH)[:SMALL_BATCH].astype(np.uint64) * SMALL_BYTES
        batch = transport.Batch(
            local.ctypes.data + at,
            np.full(SMALL_BATCH, handle, np.int32),
            spread,
            np.full(SMALL_BATCH, SMALL_BYTES, np.uint64),
        )
        end_ns = time.monotonic_ns() + 120_000_000_000
        client.prepare(local.ctypes.data, local.size)
        samples = take_turns(
            {
                "read": lambda _: timed(lambda: _check(client.read(batch, end_ns) == SMALL_BATCH, "read")),
                "write": lambda _: timed(lambda: _check(client.write(batch, end_ns) == SMALL_BATCH, "write")),
            },
            budget_s,
            20,
            5000,
            5,
        )
        return {
            "block_bytes": SMALL_BYTES,
            "batch": SMALL_BATCH,
            "data_path": client.capabilities.data_path,
            "lanes": client.stats(),
            **{name: {**summary(taken), "us_per_block": _per_block(taken)} for name, taken in samples.items()},
        }


def _per_block(taken: list[int]) -> float:
    return round(float(np.median(taken)) / SMALL_BATCH / 1e3, 3)


_OWNER = """
import sys, transport
size = int(sys.argv[1])
with transport.create("ucx") as owner, owner.create_region("perf", 1, size) as region:
    region.buffer[:] = 1
    print(region.descriptor.hex(), flush=True)
    sys.stdin.read()
"""


@contextmanager
def _owner() -> Iterator[bytes]:
    command = [sys.executable, "-c", _OWNER, str(4 * SMALL_BYTES * SMALL_BATCH)]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as process:
        try:
            assert process.stdout is not None
            yield bytes.fromhex(process.stdout.readline().decode())
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(START_S)


# --- for people ---


def _describe(record: dict[str, Any]) -> str:
    return (
        f"{size_text(record['block_bytes']):>8} x {record['batch']:<4} "
        f"get {record['get']['gb_s']:.2f} GB/s ({record['get']['ratio']['median']:.0%} of a stream), "
        f"put {record['put']['gb_s']:.2f} GB/s ({record['put']['ratio']['median']:.0%})"
    )


def _show(console: Console, results: dict[str, Any], verdicts: list[targets.Verdict]) -> None:
    table = Table(title="between two hosts: UCX over TCP against a plain socket stream")
    for name in ("block", "batch", "stream in\nGB/s", "get\nGB/s", "get\nratio", "stream out\nGB/s", "put\nGB/s"):
        table.add_column(name, justify="right")
    table.add_column("put\nratio", justify="right")
    table.add_column("node CPU\ns per GiB read", justify="right")
    for record in results["tcp"]:
        get, put = record["get"], record["put"]
        table.add_row(
            size_text(record["block_bytes"]),
            str(record["batch"]),
            f"{get['stream_gb_s']:.2f}",
            f"{get['gb_s']:.2f}",
            f"{get['ratio']['median']:.0%}",
            f"{put['stream_gb_s']:.2f}",
            f"{put['gb_s']:.2f}",
            f"{put['ratio']['median']:.0%}",
            f"{record['node_cpu_s_per_gib_read']:.3f}",
        )
    console.print(table)
    console.print(report.targets_table(verdicts))


if __name__ == "__main__":
    main()
