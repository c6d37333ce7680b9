"""What the server knows about one block, as sentences."""

from __future__ import annotations

from typing import Any

from memfabric import units
from memfabric.cli.output import plural
from memfabric.cli.render import ago

_REASONS = (
    ("evicted_blocks", "evicted to make room"),
    ("expired_blocks", "expired"),
    ("removed_blocks", "removed on request"),
    ("lost_blocks", "lost with a node"),
    ("corrupt_blocks", "dropped as corrupt"),
    ("no_space_blocks", "refused for lack of space"),
)


def tell(document: dict[str, Any]) -> list[str]:
    """Lines for people; every one states one fact."""
    head = f"Block {document.get('key')} in namespace {document.get('namespace')}"
    if "node" not in document:
        return [f"{head} is {document.get('state', 'unknown')}.", *_why_missing(document)]
    return [
        f"{head} is {_state(document)}.",
        *_place(document),
        *_chain(document),
        *_use(document),
        *_future(document),
    ]


def _state(document: dict[str, Any]) -> str:
    state = document.get("state", "unknown")
    if state == "complete":
        return "readable" if document.get("readable") else "stored, but not served any more (past its time to live)"
    return {"writing": "being written by a client", "doomed": "removed, but still being read"}.get(state, str(state))


def _why_missing(document: dict[str, Any]) -> list[str]:
    lines = ["  It was never stored here, or it has gone since."]
    counters = document.get("counters") or {}
    gone = [f"{plural(counters[name], 'block')} {words}" for name, words in _REASONS if counters.get(name)]
    if gone:
        lines.append("  In this namespace, since the server's start: " + ", ".join(gone) + ".")
    else:
        lines.append("  No block of this namespace has gone since the server's start.")
    return lines


def _place(document: dict[str, Any]) -> list[str]:
    place = f"  It lies on node {document['node']}"
    state = document.get("node_state")
    if state and state != "active":
        place += f" ({state})"
    place += f", region {document.get('region')}, block {document.get('block_index')}"
    return [f"{place}, generation {document.get('generation')}.", f"  It holds {document.get('tokens')} tokens."]


def _chain(document: dict[str, Any]) -> list[str]:
    parent, children = document.get("parent"), document.get("children")
    line = f"  It continues block {parent}" if parent else "  It starts its chain, as far as the pool still holds it"
    if document.get("depth"):
        line += f" (block {document['depth'] + 1} of its prompt)"
    if children:
        line += f"; {plural(children, 'block')} continue{'s' if children == 1 else ''} it"
    return [line + "."]


def _use(document: dict[str, Any]) -> list[str]:
    reuse, age = document.get("reuse"), document.get("age_ns")
    lines = []
    if isinstance(reuse, int):
        line = (
            f"  It was reused {'once' if reuse == 1 else plural(reuse, 'time')}" if reuse else "  It was never reused"
        )
        lines.append(line + (f"; last use {ago(age)}." if isinstance(age, int) else "."))
    for lease in document.get("leases") or []:
        ends = units.format_duration(max(0, lease.get("ends_in_ns", 0)))
        lines.append(f"  Client {lease.get('session')} holds a {lease.get('kind')} lease that ends in {ends}.")
    return lines


def _future(document: dict[str, Any]) -> list[str]:
    lines = []
    if document.get("evictable"):
        lines.append("  It may be evicted when space is needed.")
    elif document.get("not_evictable_because"):
        lines.append("  It cannot be evicted now: " + ", ".join(document["not_evictable_because"]) + ".")
    expires = document.get("expires_in_ns")
    if isinstance(expires, int):
        lines.append(f"  Its time to live ends in {units.format_duration(max(0, expires))}, unless it is used before.")
    return lines
