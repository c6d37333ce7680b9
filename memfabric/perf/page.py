"""A sweep as one HTML file that needs nothing else: diagrams, a table, histograms, and what it was taken on."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from memfabric import units
from memfabric.perf import svg
from memfabric.perf.charts import about, panels
from memfabric.perf.histogram import Histogram
from memfabric.perf.plan import REQUESTS
from memfabric.perf.results import point_of

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#30343b;max-width:1320px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}p.about,td.note{color:#70767f}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:1.2rem;margin:1rem 0}
svg text{font:11.5px system-ui,sans-serif;fill:#30343b}svg .title{font-weight:700;font-size:14px}
svg .end{text-anchor:end}svg .middle{text-anchor:middle}svg .note{fill:#70767f}svg .grid{stroke:#e6e8eb}
svg.bars rect{fill:#2e86c1}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px}th{text-align:right;color:#70767f;font-weight:600;padding:.2rem .6rem}
td{text-align:right;padding:.2rem .6rem;border-top:1px solid #e6e8eb;white-space:nowrap}
th:first-child,td:first-child,td.note,th.note{text-align:left}td.note{white-space:normal;min-width:12rem}
pre{background:#f5f6f8;padding:.8rem;overflow-x:auto;font-size:12px}.warn{color:#b03a2e}
"""
NOTHING = "\N{EN DASH}"
_HEADS = ("point", "speed", "least to most", "p50", "p90", "p99", "p99.9", "max", "limit", "of limit", "node CPU")


def html(document: dict[str, Any]) -> str:
    """The whole page."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>memfabric perf</title>',
        f"<style>{_STYLE}</style></head><body><h1>memfabric perf</h1>",
        f'<p class="about">{escape(about(document))} · {document["seconds"]} s</p>',
    ]
    if document.get("stopped"):
        parts.append(f'<p class="warn">This sweep is not complete: {escape(str(document["stopped"]))}.</p>')
    for pair in panels(document):
        parts.append(f'<div class="pair">{"".join(f"<div>{svg.diagram(panel)}</div>" for panel in pair)}</div>')
    parts += [_points(document), _tools(document), _left_out(document)]
    facts = {name: document.get(name) for name in ("machine", "sweep", "transports")}
    parts.append(f"<h2>Taken on</h2><pre>{escape(json.dumps(facts, indent=1, ensure_ascii=False))}</pre>")
    return "".join([*parts, "</body></html>\n"])


def _points(document: dict[str, Any]) -> str:
    rows = []
    for record in document["points"]:
        if not record.get("summary"):
            continue
        histogram = record["histogram"]
        drawn = svg.bars(Histogram.load(histogram["counts"], histogram["least_ns"], histogram["most_ns"]))
        cells = [escape(str(point_of(record))), *map(escape, figures(record))]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}<td>{drawn}</td>")
        rows.append(f'<td class="note">{escape(str(record["data_path"]))}</td></tr>')
    heads = "".join(f"<th>{escape(head)}</th>" for head in _HEADS)
    return (
        "<h2>Points</h2><p class='about'>Speeds are medians over the repeats; times, in µs, are of single operations "
        "of all repeats; the axis of a histogram is logarithmic, from the least to the greatest time.</p>"
        f'<div class="scroll"><table><tr>{heads}<th>histogram</th><th class="note">data path</th></tr>{"".join(rows)}'
        "</table></div>"
    )


def figures(record: dict[str, Any]) -> list[str]:
    """The cells of a measured point: speed, its range, percentiles, limit, ratio, the nodes' processor time."""
    summary, latency = record["summary"], record["summary"]["latency"]
    rate = summary["blocks_per_s" if record["op"] in REQUESTS else "bytes_per_s"]
    show = rate_text if record["op"] not in REQUESTS else keys_text
    times = [time_text(latency[name]) for name in ("p50_us", "p90_us", "p99_us", "p999_us", "max_us")]
    ratio = summary.get("ratio")
    cost = summary.get("node_cpu_s_per_gib")
    return [
        show(rate["median"]),
        f"{show(rate['least'])} to {show(rate['most'])}",
        *times,
        str(record.get("limit") or NOTHING),
        NOTHING if ratio is None else f"{ratio['median']:.0%}",
        NOTHING if cost is None else cost_text(cost),
    ]


def cost_text(seconds_per_gib: float) -> str:
    """Processor seconds for each GiB; thousandths are below what can be told from idling."""
    return f"{seconds_per_gib:.3g} s/GiB" if seconds_per_gib >= 0.001 else "0 s/GiB"


def rate_text(bytes_per_s: float) -> str:
    """``12.3 GB/s``, ``0.045 GB/s``."""
    return f"{bytes_per_s / 1e9:.3g} GB/s"


def keys_text(keys_per_s: float) -> str:
    """``812 k/s``: thousands of keys."""
    return f"{keys_per_s / 1e3:.3g} k/s"


def time_text(microseconds: float | None) -> str:
    """Three digits; a dash where there are too few values."""
    if microseconds is None:
        return NOTHING
    return f"{microseconds:,.0f}" if microseconds >= 100 else f"{microseconds:.3g}"


def tool_text(figure: dict[str, Any]) -> str:
    """What a tool said, in a line."""
    where = f"{figure['tool']}, {figure['op']} beside {figure['transport']}"
    if figure["bytes_per_s"] is None:
        return f"{where}: {figure['reason']}"
    return f"{where}, {units.format_bytes(figure['block_bytes'])}: {rate_text(figure['bytes_per_s'])}"


def _tools(document: dict[str, Any]) -> str:
    lines = "".join(f"<li>{escape(tool_text(figure))}</li>" for figure in document["tools"])
    return f"<h2>Other tools</h2><ul>{lines}</ul>" if lines else ""


def _left_out(document: dict[str, Any]) -> str:
    lines = [f"{point_of(record)}: {record['problem']}" for record in document["points"] if record.get("problem")]
    lines += [f"{each['point']}: {each['reason']}" for each in document["skipped"]]
    shown = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>Not measured, or not as often as asked for</h2><ul>{shown}</ul>" if shown else ""
