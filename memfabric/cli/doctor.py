"""``memfabric doctor``: what this host can do, and what keeps it from doing better."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from memfabric.cli.base import Settings, common_options, examples, pass_settings
from memfabric.cli.memory import DIRECTORY_VARIABLE, SHARED_MEMORY
from memfabric.cli.output import console, emit_json, plural, takes_unicode

if TYPE_CHECKING:
    from rich.console import Console

    from memfabric.doctor import Finding, Report

EXIT_PROBLEMS = 1
_STYLES = {"problem": "bold red", "warning": "yellow", "info": "cyan", "ok": "green", "missing": "dim"}
_MARKS = {"problem": ("✗", "X"), "warning": ("!", "!"), "info": ("·", "-"), "ok": ("✓", "+"), "missing": ("✗", "x")}
_INDENT = 19
"""Columns of a mark and the longest area."""


@click.command(
    short_help="Tell what this host can do for a pool, and what is in its way.",
    epilog=examples(
        """
memfabric doctor
memfabric doctor --address tcp://10.0.0.1:7170    # and whether its nodes can be reached from here
memfabric doctor --strict && memfabric up
memfabric doctor --json | jq -r '.findings[] | select(.severity == "problem").what'
"""
    ),
)
@click.option("--strict", is_flag=True, help="End with exit code 1 if there is a problem.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    envvar=DIRECTORY_VARIABLE,
    default=SHARED_MEMORY,
    help=f"Where nodes keep shared memory.  [default: ${DIRECTORY_VARIABLE} or {SHARED_MEMORY}]",
)
@common_options(json=True, address="Also look at the pool of this metadata server.", default=False)
@pass_settings
@click.pass_context
def doctor(ctx: click.Context, settings: Settings, strict: bool, directory: Path) -> None:
    """Tell what this host can do for a pool, and what is in its way.

    It looks at transports, RDMA adapters, memory and its limits, GPUs, processors and the network, and says what to do
    about what it finds. It changes nothing and needs no rights: what it cannot see it leaves out. Transports are tried
    in processes of their own, so that a broken driver does no harm.
    """
    from memfabric.doctor import System, examine

    address = settings.server if settings.address is not None else None
    report = examine(System(shared_memory=directory), address=address, timeout_s=settings.timeout_s)
    if settings.as_json:
        emit_json(report.document())
    else:
        show(report, console())
    if strict and report.problems:
        ctx.exit(EXIT_PROBLEMS)


def show(report: Report, screen: Console) -> None:
    """For people: transports, then what can be mended, then the rest, each with a line."""
    from rich.text import Text

    _heading(screen, "Transports")
    for verdict in report.transports:
        kind = "missing" if not verdict.usable else "warning" if verdict.slower else "ok"
        _rows(screen, kind, verdict.name, verdict.words, verdict.detail if verdict.usable else "")
    groups = {"To mend": ("problem", "warning"), "Worth knowing": ("info",), "In order": ("ok",)}
    for title, kinds in groups.items():
        found = [finding for finding in report.findings if finding.severity.value in kinds]
        if found:
            screen.print()
            _heading(screen, title)
        for finding in found:
            _show_finding(screen, finding)
    screen.print()
    warnings = sum(finding.severity.value == "warning" for finding in report.findings)
    style = _STYLES["problem" if report.problems else "warning" if warnings else "ok"]
    screen.print(Text(f"{plural(report.problems, 'problem')}, {plural(warnings, 'warning')}", style=style))


def _show_finding(screen: Console, finding: Finding) -> None:
    from rich.text import Text

    _rows(screen, finding.severity.value, finding.area, finding.what, finding.why)
    for command in finding.fix:
        # Not wrapped by us: a terminal that wraps a long line gives it back whole when it is copied.
        screen.print(Text(" " * 4 + command, style="bold"), soft_wrap=True)


def _heading(screen: Console, title: str) -> None:
    from rich.text import Text

    screen.print(Text(title, style="bold underline"))


def _rows(screen: Console, kind: str, area: str, words: str, more: str) -> None:
    """A mark, what it is about, what is to be said, and below that what is to be said in a lower voice."""
    from rich.text import Text

    width = max(20, screen.width - _INDENT)

    def wrapped(text: str) -> list[str]:
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]

    mark = Text(_MARKS[kind][0 if takes_unicode() else 1], style=_STYLES[kind])
    first, *rest = wrapped(words)
    lines = [Text.assemble(mark, "  ", (area.ljust(_INDENT - 3), "bold"), first)]
    lines += [Text(" " * _INDENT + line) for line in rest]
    lines += [Text(" " * _INDENT + line, style="dim") for line in (wrapped(more) if more else [])]
    for line in lines:
        screen.print(line, soft_wrap=True)
