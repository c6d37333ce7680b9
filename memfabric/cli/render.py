"""The status document as text: nodes, namespaces, occupancy, hit rates, leases.

A field that a server does not send is shown as a dash, so that a newer command can look at an older server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memfabric import units
from memfabric.cli.output import NOTHING, bar, count, percent, plural, ratio_of, table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_STATE_STYLES = {"active": "green", "draining": "yellow", "dead": "red"}
_TROUBLES = (
    ("lost_blocks", "lost with a node"),
    ("corrupt_blocks", "corrupt"),
    ("no_space_blocks", "refused for lack of space"),
    ("expired_leases", "leases expired"),
)
"""Counters that are worth a line only when they are not zero."""

WIDE = 120
"""Columns that the widest table takes."""

Doc = dict[str, Any]


def status_view(document: Doc, width: int) -> RenderableType:
    """Everything at a glance, for a screen of `width` columns."""
    from rich.console import Group
    from rich.text import Text

    nodes = document.get("nodes") or []
    namespaces = document.get("namespaces") or []
    parts: list[RenderableType] = [headline(document), Text()]
    if nodes:
        parts += [nodes_table(nodes)]
    else:
        parts += [Text("No node has joined yet; start one with `memfabric node`.", style="yellow")]
    parts += [Text()]
    if namespaces:
        parts += [namespaces_table(namespaces, wide=width >= WIDE)]
        parts += troubles(namespaces)
    else:
        parts += [Text("No namespace yet; create one with `memfabric namespace create`.", style="dim")]
    return Group(*parts)


def headline(document: Doc) -> Text:
    """One line about the server."""
    from rich.text import Text

    leases = document.get("leases") or {}
    facts = [
        f"up {duration(document.get('uptime_ns'))}",
        f"epoch {document.get('epoch', NOTHING)}",
        _counted(document.get("sessions"), "client"),
        f"leases {count(leases.get('read'))} read, {count(leases.get('write'))} write",
        f"{_counted(document.get('unassigned_regions'), 'region')} free",
        _counted(document.get("requests"), "request"),
    ]
    refused = document.get("refused")
    if refused:
        facts.append(f"{refused:,} refused")
    return Text.assemble(
        ("memfabric ", "bold"), (str(document.get("address", "")), "bold cyan"), "  ", " · ".join(facts)
    )


def nodes_table(nodes: list[Doc]) -> Table:
    """One line a node."""
    from rich.text import Text

    made = table("node", "state", "lent over", ">memory", "in use", ">blocks", ">regions used", ">heartbeat")
    for node in nodes:
        state = str(node.get("state", NOTHING))
        alive = state != "dead"
        occupied = ratio_of(node.get("used_bytes"), node.get("capacity_bytes"))
        if occupied is None:
            occupied = ratio_of(node.get("used_blocks"), node.get("capacity_blocks"))
        made.add_row(
            str(node.get("name", NOTHING)),
            Text(state, style=_STATE_STYLES.get(state, "")),
            ", ".join(node.get("transports") or []) or NOTHING,
            size(node.get("capacity_bytes")) if alive else NOTHING,
            bar(occupied) if occupied is not None and alive else NOTHING,
            count(node.get("used_blocks")) if alive else NOTHING,
            f"{count(node.get('regions_assigned'))} of {count(node.get('regions'))}" if alive else NOTHING,
            ago(node.get("heartbeat_age_ns")),
        )
    return made


def namespaces_table(namespaces: list[Doc], *, wide: bool = True) -> Table:
    """One line a namespace; on a narrow screen without the columns that say least."""
    headers = ["namespace", ">block", ">blocks", "in use"]
    if wide:
        headers += [">match hits", ">read hits", ">leases r/w", ">quarantine", ">evicted", ">clients", "policy"]
    else:
        headers += [">match", ">read", ">leases", ">quar."]
    made = table(*headers)
    for namespace in namespaces:
        counters = namespace.get("counters") or {}
        occupied = occupancy(namespace)
        match, read = hit_ratios(counters)
        cells: list[RenderableType] = [
            str(namespace.get("name", NOTHING)),
            size(namespace.get("block_bytes")),
            f"{count(namespace.get('blocks'))} of {count(namespace.get('capacity_blocks'))}",
            bar(occupied, 12 if wide else 8) if occupied is not None else NOTHING,
            percent(match),
            percent(read),
            f"{count(namespace.get('read_leases'))} / {count(namespace.get('write_leases'))}",
            count(namespace.get("quarantined")),
        ]
        if wide:
            cells += [count(counters.get("evicted_blocks", 0)), count(namespace.get("sessions")), policy(namespace)]
        made.add_row(*cells)
    return made


def troubles(namespaces: list[Doc]) -> list[RenderableType]:
    """A line for each namespace in which something went wrong since the server's start."""
    from rich.text import Text

    lines: list[RenderableType] = []
    for namespace in namespaces:
        counters = namespace.get("counters") or {}
        said = [f"{counters[name]:,} {words}" for name, words in _TROUBLES if counters.get(name)]
        if said:
            lines.append(Text(f"{namespace.get('name')}: {', '.join(said)}", style="yellow"))
    return [Text(), *lines] if lines else []


def occupancy(namespace: Doc) -> float | None:
    """Share of a namespace's space that is not free: of its quota if it has one, else of its regions."""
    quota = namespace.get("quota_bytes")
    if quota:
        return ratio_of(namespace.get("used_bytes"), quota)
    capacity, block = namespace.get("capacity_blocks"), namespace.get("block_bytes")
    if not isinstance(capacity, int) or not isinstance(block, int):
        return None
    return ratio_of(namespace.get("used_bytes"), capacity * block)


def hit_ratios(counters: Doc) -> tuple[float | None, float | None]:
    """Share of the matched and of the read blocks that were there; None where none was asked for.

    Optimistic reads that hit never asked the server; they are counted where the client reported them.
    """
    optimistic = counters.get("optimistic_hit_blocks", 0)
    return (
        ratio_of(counters.get("match_hit_blocks", 0), counters.get("match_asked_blocks", 0)),
        ratio_of(
            counters.get("acquire_hit_blocks", 0) + optimistic,
            counters.get("acquire_asked_blocks", 0) + optimistic,
        ),
    )


def policy(namespace: Doc) -> str:
    """``lru``, ``lru 5 min``, with the quota where there is one."""
    words = [str(namespace.get("policy", NOTHING))]
    if namespace.get("ttl_ns"):
        words.append(units.format_duration(namespace["ttl_ns"]))
    if namespace.get("quota_bytes"):
        words.append(f"quota {units.format_bytes(namespace['quota_bytes'])}")
    return " ".join(words)


def size(value: Any) -> str:
    """Bytes for people."""
    return units.format_bytes(value) if isinstance(value, int) else NOTHING


def duration(value: Any) -> str:
    """Nanoseconds for people, to tenths of a second: finer digits only flicker."""
    return units.format_duration(round(value, -8)) if isinstance(value, int) else NOTHING


def ago(value: Any) -> str:
    """How long ago: ``just now``, ``1.5 s ago``, ``3 min 5 s ago``."""
    if not isinstance(value, int):
        return NOTHING
    return f"{duration(value)} ago" if value >= 10**9 else "just now"


def _counted(value: Any, noun: str) -> str:
    return plural(value, noun) if isinstance(value, int) else f"{NOTHING} {noun}s"
