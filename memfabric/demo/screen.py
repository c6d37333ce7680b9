"""What people see: progress on standard error while it works, a table on standard output at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from memfabric.demo.report import DemoReport, RequestReport
from memfabric.units import format_bytes

_TEXT_LIMIT = 220


class Progress:
    """Steps, one after the other: a spinner with what is being done on a terminal, plain lines elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def note(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Callable[[str], None]]:
        """A step; gives a function for what it is doing now. Its time is told when it is over."""
        start_s = time.monotonic()
        if self.console.is_terminal:
            with self.console.status(escape(title)) as status:
                yield lambda text: status.update(f"{escape(title)} [dim]· {escape(text)}[/dim]")
        else:
            self.console.print(f"{title} …", markup=False)
            yield lambda text: self.console.print(f"  {text}", markup=False)
        elapsed_s = time.monotonic() - start_s
        if self.console.is_terminal:
            self.console.print(f"[green]✓[/green] {escape(title)} [dim]({elapsed_s:.1f} s)[/dim]")
        else:
            self.console.print(f"  done in {elapsed_s:.1f} s", markup=False)


def show(report: DemoReport) -> None:
    """Print the table, the generated texts and what the figures mean on standard output."""
    console = Console(highlight=False)
    console.print()
    console.print(_table(report))
    for request in report.requests:
        console.print(f"[bold]{escape(request.name)}[/bold]: {escape(_shorten(request.text))}", soft_wrap=True)
    repeats = len(report.requests[0].ttft_pool_s)
    where = ", the pool and prefill on one host, decode on another" if report.hosts > 1 else ""
    console.print(
        f"\n[dim]Time to first token (TTFT): from the tokenized prompt to the first token; finding, reading and "
        f"verifying blocks included, loading the model not; median of {repeats}. {escape(report.model)}, 4-bit weights "
        f"computed in {report.dtype}, one thread a process; blocks of {report.block_tokens} tokens "
        f"({format_bytes(report.block_bytes)}). Prefill, decode and the runs without the pool are processes of their "
        f"own{where}; KV went through the pool only, by {escape(report.transport)}.[/dim]"
    )
    console.print(f"Plot: {escape(report.plot)}", soft_wrap=True)


def _table(report: DemoReport) -> Table:
    """Processes as columns: it fits a terminal of 80 characters."""
    prefill, requests = report.prefill, report.requests
    table = Table(title="Prefill and decode in separate processes, KV through the pool", title_justify="left")
    table.add_column("")
    for role, name in [("prefill", prefill.name), *(("decode", request.name) for request in requests)]:
        table.add_column(f"{role}\n{name}", justify="right")

    def row(title: str, of_prefill: str, of_request: Callable[[RequestReport], str], *, ends: bool = False) -> None:
        table.add_row(title, of_prefill, *(of_request(request) for request in requests), end_section=ends)

    row("Process id", str(report.pids["prefill"]), lambda _: str(report.pids["decode"]))
    row("Prompt tokens", str(prefill.prompt_tokens), lambda request: str(request.prompt_tokens))
    row("Tokens reused", "0", lambda request: str(request.reused_tokens), ends=True)
    row("Blocks written", str(prefill.blocks_written), lambda request: str(request.blocks_written))
    row("Bytes written", format_bytes(prefill.bytes_written), lambda request: format_bytes(request.bytes_written))
    row("Blocks read and reused", "0", lambda request: str(request.blocks_read))
    row("Bytes read and reused", "0 B", lambda request: format_bytes(request.bytes_read), ends=True)
    row("TTFT without the pool", f"{prefill.compute_s:.2f} s", lambda request: f"{request.cold_s:.2f} s")
    row("TTFT with the pool", "-", lambda request: f"[bold]{request.pool_s:.2f} s[/bold]")
    row("  … the first time", "-", lambda request: f"{request.ttft_pool_s[0]:.2f} s")
    row("Speed-up", "-", lambda request: f"[bold]{request.speedup_ratio:.1f}x[/bold]", ends=True)
    row("Tokens identical", "-", _verdict)
    return table


def _verdict(request: RequestReport) -> str:
    at = request.first_difference
    if at is None:
        return f"[green]yes[/green] ({len(request.tokens_cold)} of {len(request.tokens_cold)})"
    return f"[bold red]NO[/bold red] (from {at} on)"


def _shorten(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= _TEXT_LIMIT else f"{one_line[: _TEXT_LIMIT - 1]}…"
