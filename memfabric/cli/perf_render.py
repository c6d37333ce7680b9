"""Sweeps, comparisons and presets for people: tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memfabric import units
from memfabric.cli.output import NOTHING, plural, table
from memfabric.errors import UsageError
from memfabric.perf.compare import FASTER, NOISY, SAME, SLOWER, Comparison, Verdict
from memfabric.perf.page import figures, keys_text, rate_text, time_text, tool_text
from memfabric.perf.plan import REQUESTS, Plan
from memfabric.perf.presets import Model
from memfabric.perf.results import point_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES = {FASTER: "green", SLOWER: "red", NOISY: "yellow", SAME: ""}
_WIDE, _MIDDLE = 150, 90
_OPTIONAL = {
    "transport": "over",
    "kind": "memory",
    "depth": ">depth",
    "threads": ">threads",
    "clients": ">clients",
    "nodes": ">nodes",
}
"""Axes that have a column only where points differ in them."""


def plan_text(plan: Plan) -> str:
    """What is about to happen, and how long it will take."""
    sweep = plan.sweep
    points, repeats = plural(plan.count(), "point"), plural(sweep.repeats, "repeat")
    said = [
        f"{points}, {repeats} each: about {units.format_duration(round(plan.estimate_s) * 10**9)}, "
        f"at most {units.format_bytes(plan.memory_bytes)} of memory."
    ]
    if plan.point_s < sweep.point_s:
        said.append(f"To keep within {sweep.total_s:g} s a point gets {plan.point_s:.2g} s, not {sweep.point_s:g} s.")
    said += [f"Left out: {point}: {reason}." for point, reason in plan.skipped[:3]]
    if len(plan.skipped) > 3:
        said.append(f"Left out for the same reason: {plural(len(plan.skipped) - 3, 'other point')}.")
    return "\n".join(said)


def points_table(document: dict[str, Any], width: int) -> Table | None:
    """A line for each point that was measured, None when none was; on a narrow screen without what says least."""
    wide = width >= _WIDE
    records = [record for record in document["points"] if record.get("summary")]
    if not records:
        return None
    axes = [name for name in _OPTIONAL if _differs(document["points"], name)]
    heads = ["op", *(_OPTIONAL[name] for name in axes), ">block", ">batch", ">speed"]
    if wide:
        heads += [">least to most", ">p50", ">p90", ">p99", ">p99.9", ">max", "limit", ">of it", ">node cpu"]
    else:
        heads += [">±", ">p50", ">p99", ">of it", *(["limit"] if width >= _MIDDLE else [])]
    made = table(*heads)
    for record in records:
        cells = [record["op"], *(_axis(name, record[name]) for name in axes)]
        cells.append(NOTHING if record["op"] in REQUESTS else units.format_bytes(record["block_bytes"]))
        cells.append(str(record["batch"]))
        shown = figures(record)
        if not wide:
            speed, _, p50, _, p99, _, _, limit, ratio, _ = shown
            shown = [speed, _spread(record), p50, p99, ratio, *([limit] if width >= _MIDDLE else [])]
        made.add_row(*cells, *shown)
    return made


def _differs(points: Sequence[dict[str, Any]], name: str) -> bool:
    values = {each[name] for each in points}
    return len(values - {0} if name == "nodes" else values) > 1


def _axis(name: str, value: Any) -> str:
    if not value:
        return "auto" if name == "threads" else NOTHING  # no nodes: an owner of a region
    return str(value)


def _spread(record: dict[str, Any]) -> str:
    """Half of what lies between the slowest and the fastest repeat, of the median."""
    rate = record["summary"]["blocks_per_s"]
    return f"{(rate['most'] - rate['least']) / 2 / rate['median']:.0%}"


def show_sweep(console: Console, document: dict[str, Any]) -> None:
    """Table, other tools, and what was not measured."""
    made = points_table(document, console.width)
    if made is not None:
        console.print(made)
        said = "Speeds: median of the repeats; times: µs, of single operations"
        console.print(
            f"[dim]{said}; of it: of the limit measured beside the point; node cpu: of memory nodes, beyond idle.[/]"
        )
    for figure in document["tools"]:
        console.print(f"[dim]{_plain(tool_text(figure))}[/]")
    troubles: dict[str, list[str]] = {}
    for record in document["points"]:
        if record.get("problem"):
            troubles.setdefault(record["problem"], []).append(str(point_of(record)))
    for problem, points in troubles.items():
        more = f" and {plural(len(points) - 1, 'other point')}" if len(points) > 1 else ""
        console.print(
            f"[yellow]not measured, or not as often as asked for: {_plain(points[0] + more)}: {_plain(problem)}[/]"
        )
    if document.get("left_behind"):
        names = ", ".join(document["left_behind"])
        console.print(f"[yellow]these namespaces could not be removed: {_plain(names)}[/]")
    if document.get("stopped"):
        console.print(f"[yellow]not complete: {_plain(str(document['stopped']))}[/]")


def show_comparison(console: Console, comparison: Comparison) -> None:
    """A line for each point that both have, the worst first, then what is doubtful."""
    wide = console.width >= _WIDE
    made = table("verdict", ">change", "bounds", *([">old", ">new"] if wide else []), "point")
    order = {SLOWER: 0, FASTER: 1, NOISY: 2, SAME: 3}
    for verdict in sorted(comparison.verdicts, key=lambda each: order[each.verdict]):
        bounds = "too few repeats" if verdict.low is None else f"{verdict.low:+.1%} to {verdict.high:+.1%}"
        style = _STYLES[verdict.verdict]
        said = f"[{style}]{verdict.verdict}[/]" if style else verdict.verdict
        values = (_value(comparison.metric, verdict, number) for number in (verdict.old, verdict.new))
        shown = [said, f"{verdict.change:+.1%}", bounds, *(values if wide else ())]
        made.add_row(*shown, _plain(str(point_of(verdict.record))))
    console.print(made)
    counts = ", ".join(f"{comparison.count(name)} {name}" for name in (FASTER, SLOWER, SAME, NOISY))
    console.print(
        f"{comparison.metric}: {counts}. A verdict needs {100 * (1 - comparison.alpha):g} % bounds without 0 and a "
        f"change of {100 * comparison.effect:g} %."
    )
    expected = comparison.alpha * len(comparison.verdicts)
    if expected >= 1:
        console.print(f"[dim]With so many points up to {expected:.0f} of them may miss their bounds by chance.[/]")
    for which, records in (("old", comparison.only_old), ("new", comparison.only_new)):
        if records:
            names = "; ".join(str(point_of(record)) for record in records[:5])
            more = f"; and {len(records) - 5} more" if len(records) > 5 else ""
            console.print(f"[yellow]only in the {which} sweep: {_plain(names + more)}[/]")
    for doubt in comparison.doubts:
        console.print(f"[yellow]{_plain(doubt)}[/]")


def show_presets(console: Console, models: Sequence[Model], *, block_tokens: int, tp: int, dtype: str) -> None:
    """A line for each model, then what is to be known of some; on a narrow screen without where it is from."""
    wide = console.width >= _WIDE
    made = table("model", *(["config.json of"] if wide else []), "bytes of a token on all ranks", ">token", ">block")
    notes: dict[str, list[str]] = {}
    for model in models:
        sizes = [NOTHING, NOTHING]
        try:
            sizes = [f"{model.token_bytes(tp=tp, dtype=dtype):,} B"]
            sizes.append(units.format_bytes(model.block_bytes(block_tokens, tp=tp, dtype=dtype)))
        except UsageError as error:
            notes.setdefault(str(error), []).append(model.name)
        if model.note:
            notes.setdefault(model.note, []).append(model.name)
        made.add_row(model.name, *([model.repository] if wide else []), model.formula, *sizes)
    console.print(made)
    console.print(f"[dim]{dtype}, blocks of {plural(block_tokens, 'token')}, one rank of {tp}.[/]")
    for note, names in notes.items():
        console.print(f"[yellow]{', '.join(names)}: {_plain(note)}[/]")


def _value(metric: str, verdict: Verdict, value: float) -> str:
    if metric == "ratio":
        return f"{value:.0%}"
    if metric in ("p50", "p99"):
        return f"{time_text(value)} µs"
    return keys_text(value) if verdict.record["op"] in REQUESTS else rate_text(value)


def _plain(text: str) -> str:
    """Without what the console would take for markup."""
    from rich.markup import escape

    return escape(text)
