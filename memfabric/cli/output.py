"""Text and JSON on standard output: consoles, tables, bars.

On a terminal text has colour and fits the width; anywhere else it is plain and is never cut.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

NOTHING = "\N{EN DASH}"
_PLAIN_WIDTH = 500
_EIGHTHS = " ▏▎▍▌▋▊▉"


def console(*, stderr: bool = False) -> Console:
    """A console for people; made anew for each command, so that it sees the streams of that moment."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False, emoji=False)


def emit_json(document: object, *, one_line: bool = False) -> None:
    """Print a document for machines; keys keep their order."""
    click.echo(json.dumps(document, indent=None if one_line else 2, ensure_ascii=False))


def note(message: str) -> None:
    """Say something to people, on standard error, so that standard output stays for data.

    If nobody listens any more the message is lost, and that is all: what runs goes on, and ends in its order.
    """
    try:
        click.echo(message, err=True)
    except BrokenPipeError:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  # stays open until the end, as the stream it replaces


def table(*headers: str) -> Table:
    """A table without lines. A header that starts with ``>`` is of a column of numbers."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold dim")
    for header in headers:
        number = header.startswith(">")
        made.add_column(header.lstrip(">").upper(), justify="right" if number else "left", no_wrap=True)
    return made


def bar(ratio: float, width: int = 12) -> Text:
    """How full something is: a bar in the colour of its state, then per cent."""
    from rich.text import Text

    clipped = min(1.0, max(0.0, ratio))
    style = "green" if clipped < 0.8 else "yellow" if clipped < 0.95 else "red"
    if not takes_unicode():
        full = round(clipped * width)
        return Text.assemble(("#" * full, style), ("." * (width - full), "dim"), f" {percent(ratio):>5}")
    eighths = round(clipped * width * 8)
    if clipped > 0:
        eighths = max(1, eighths)  # something is never shown as nothing
    filled = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    return Text.assemble((filled, style), ("░" * (width - len(filled)), "dim"), f" {percent(ratio):>5}")


def takes_unicode() -> bool:
    """Whether standard output takes more than ASCII."""
    stream = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # a live display puts itself in between
    return (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "") == "utf8"


def percent(ratio: float | None) -> str:
    """``87 %``, ``0.4 %``; `NOTHING` where there is no ratio."""
    if ratio is None:
        return NOTHING
    shown = 100 * ratio
    if 0 < shown < 9.95:
        return f"{max(shown, 0.1):.1f} %"
    if 99.5 <= shown < 100:
        return "99 %"  # "100 %" only where nothing is missing
    return f"{shown:.0f} %"


def ratio_of(part: Any, whole: Any) -> float | None:
    """A ratio of two counts; None where one is missing or there is nothing to divide by."""
    if not isinstance(part, (int, float)) or not isinstance(whole, (int, float)) or not whole:
        return None
    return part / whole


def count(value: Any) -> str:
    """``12,345``; `NOTHING` where the number is missing."""
    return f"{value:,}" if isinstance(value, int) else NOTHING


def plural(value: int, noun: str) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"
