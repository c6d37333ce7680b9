"""Nodes coming, living, draining and dying; regions going to namespaces and back.

Pure. A node that was silent for `dead_ns` is dead: its blocks are misses at once, and the rights over them void. It
may come back only under a new incarnation, with regions that no old writer can reach.
"""

from __future__ import annotations

import numpy as np

from memfabric.core import introductions
from memfabric.core.cluster import Node, Region, RegionState, misfit
from memfabric.core.messages import (
    Assign,
    CommandDone,
    Done,
    Heartbeat,
    NodeDrain,
    NodeState,
    Register,
    Registered,
    Unassign,
    Unregister,
)
from memfabric.core.namespaces import Namespace, check_name
from memfabric.core.state import Publish, Send, State, topic
from memfabric.core.table import SlotState
from memfabric.errors import RefusalCode, RefusedError

GROW_RATIO = 0.5
"""A namespace gets another region when more than this share of its blocks is in use, while there are any left."""
MAX_REGIONS_PER_NODE = 65_536
MAX_REGION_BYTES = 1 << 44
MAX_DESCRIPTOR_BYTES = 20_480
"""A combined descriptor: one of each transport (`transport.auto`)."""
MAX_TRANSPORTS, MAX_TRANSPORT_NAME = 8, 64


def _command(state: State, region: Region, body: Assign | Unassign, now_ns: int) -> None:
    node = state.cluster.nodes[region.node]
    command = state.commands.new(state.config.epoch, node.name, node.incarnation, region.number, body, now_ns)
    state.emit(Send(node.peer, command))


def resend_commands(state: State, now_ns: int) -> None:
    """Send again what nodes did not answer for a while."""
    for waiting in state.commands.overdue(now_ns):
        state.emit(Send(state.cluster.nodes[waiting.node].peer, waiting.command))


# --- regions and namespaces --------------------------------------------------------------------------------------


def changed(state: State, namespace: Namespace) -> None:
    """The namespace's membership changed: tell its clients."""
    namespace.view_version += 1
    publish_view(state, namespace)


def publish_view(state: State, namespace: Namespace) -> None:
    """Publish the namespace's current view."""
    state.emit(Publish(topic("view", namespace.spec.name), state.cluster.view(namespace, state.config.epoch)))


def grow(state: State, namespace: Namespace, now_ns: int) -> bool:
    """Start assigning one more region unless one is on its way; whether one is."""
    if any(
        region.state is RegionState.ASSIGNING and region.namespace == namespace.id
        for region in state.cluster.regions.values()
    ):
        return True
    mine = {state.cluster.regions[number].node for number in namespace.regions}
    if namespace.quota_blocks is not None and state.cluster.capacity_blocks(namespace) >= namespace.quota_blocks:
        return False
    candidates = state.cluster.assignable(namespace)
    if not candidates:
        return reclaim(state, namespace, now_ns)
    region = min(candidates, key=lambda region: region.node in mine)
    assign(state, namespace, region, now_ns)
    return True


def reclaim(state: State, namespace: Namespace, now_ns: int) -> bool:
    """All regions are taken: a namespace below its fair share gets one back from the one that holds most.

    The fair share is the same number of regions for every namespace. The donor's coldest region is emptied (what is
    under leases stays until they end) and returned. Returns whether a region is on its way.
    """
    leaving = (RegionState.VACATING, RegionState.RETURNING)
    if any(region.state in leaving for region in state.cluster.regions.values()):
        return True
    fair = max(1, len(state.cluster.regions) // max(1, len(state.namespaces)))
    if len(namespace.regions) >= fair:
        return False
    donor = max(state.namespaces.values(), key=lambda other: (len(other.regions), -other.id), default=namespace)
    if len(donor.regions) <= fair:
        return False
    held = [state.cluster.regions[number] for number in donor.regions]
    fitting = [region for region in held if not misfit(region, namespace)]
    if not fitting:
        return False
    region = min(fitting, key=lambda region: _heat(state, region))
    region.state = RegionState.VACATING
    slots = np.arange(region.base, region.base + region.block_count, dtype=np.int32)
    state.log("info", "region_reclaimed", region=region.number, donor=donor.spec.name, taker=namespace.spec.name)
    state.drop_readable(donor, slots[state.table.state[slots] == SlotState.COMPLETE], "evicted")
    return_empty(state, donor, now_ns, RegionState.VACATING)
    return True


def _heat(state: State, region: Region) -> tuple[int, int]:
    """Regions with blocks in use come last, then by the last use of any of their blocks."""
    part = slice(region.base, region.base + region.block_count)
    complete = state.table.state[part] == SlotState.COMPLETE
    uses = state.table.last_use_ns[part][complete]
    return int((state.table.pins[part] > 0).sum()), int(uses.max()) if len(uses) else 0


def assign(state: State, namespace: Namespace, region: Region, now_ns: int) -> None:
    """Tell the node to format a region for the namespace."""
    scrub = state.cluster.begin_assign(region, namespace)
    body = Assign(
        region_id=region.offer.region_id,
        namespace=namespace.spec.name,
        namespace_id=namespace.id,
        fingerprint_digest=namespace.spec.fingerprint.digest(),
        block_bytes=namespace.spec.block_bytes,
        segments=namespace.spec.segments,
        scrub=scrub,
    )
    _command(state, region, body, now_ns)


def first_regions(state: State, namespace: Namespace, now_ns: int) -> None:
    """A namespace starts with one region of each node, as far as there are any."""
    taken: set[str] = set()
    for region in state.cluster.assignable(namespace):
        if region.node not in taken:
            taken.add(region.node)
            assign(state, namespace, region, now_ns)


def return_empty(state: State, namespace: Namespace, now_ns: int, *states: RegionState) -> None:
    """Give back the namespace's wholly free regions that are in one of `states`."""
    regions = [state.cluster.regions[number] for number in sorted(namespace.regions)]
    back = [region for region in regions if region.state in states and region.free_count == region.block_count]
    for region in back:
        state.cluster.begin_return(region, namespace)
        _command(state, region, Unassign(region_id=region.offer.region_id), now_ns)
    if back:
        changed(state, namespace)


def retire(state: State, namespace: Namespace, now_ns: int) -> None:
    """A deleted namespace, without readable blocks and leases, gives its regions back as their quarantines end."""
    state.retiring[namespace.id] = namespace
    return_retired(state, now_ns)


def return_retired(state: State, now_ns: int) -> None:
    """Take back what deleted namespaces no longer use, and regions that are being vacated and are empty by now."""
    for namespace in state.namespaces.values():
        return_empty(state, namespace, now_ns, RegionState.VACATING)
    for namespace in list(state.retiring.values()):
        return_empty(state, namespace, now_ns, RegionState.ACTIVE, RegionState.VACATING)
        if not namespace.regions:
            del state.retiring[namespace.id]


def command_done(state: State, peer: bytes, body: CommandDone, now_ns: int) -> Done:
    """A node has done a command; a repeated answer changes nothing."""
    node = _node(state, body.node, body.incarnation)
    _alive(node, peer, now_ns)
    waiting = state.commands.done(body.command, node.name)
    if waiting is None:
        return Done()
    if waiting.region is None:
        introductions.answered(state, waiting, body)
        return Done()
    region = state.cluster.regions[waiting.region]
    if body.error:
        region.state = RegionState.FAILED
        region.namespace = None
        state.log("error", "region_failed", node=node.name, region=region.number, error=body.error[:500])
    elif region.state is RegionState.RETURNING:
        region.state = RegionState.UNASSIGNED
        region.namespace = None
    elif region.state is RegionState.ASSIGNING:
        namespace = state.namespaces.get(region.namespace or 0)
        if namespace is None:  # deleted meanwhile
            region.state = RegionState.RETURNING
            _command(state, region, Unassign(region_id=region.offer.region_id), now_ns)
        else:
            state.cluster.activate(region, namespace)
            state.log("info", "region_active", node=node.name, region=region.number, namespace=namespace.spec.name)
            changed(state, namespace)
    return Done()


# --- nodes -------------------------------------------------------------------------------------------------------


def register(state: State, peer: bytes, body: Register, now_ns: int) -> Registered:
    """A node announces itself. Repeating it is harmless.

    Raises:
        RefusedError: the name is another living node's, or the offer makes no sense.
    """
    check_name("node", body.node)
    config = state.config
    if len(body.regions) > MAX_REGIONS_PER_NODE:
        raise RefusedError(RefusalCode.BAD_REQUEST, f"{len(body.regions)} regions; at most {MAX_REGIONS_PER_NODE}")
    for offer in body.regions:
        if not 0 < offer.size_bytes <= MAX_REGION_BYTES or len(offer.descriptor) > MAX_DESCRIPTOR_BYTES:
            raise RefusedError(
                RefusalCode.BAD_REQUEST, f"region {offer.region_id:#x} has an impossible size or descriptor"
            )
    if len(body.transports) > MAX_TRANSPORTS or any(len(name) > MAX_TRANSPORT_NAME for name in body.transports):
        raise RefusedError(RefusalCode.BAD_REQUEST, "too many transports, or one with too long a name")
    ids = [offer.region_id for offer in body.regions]
    known = state.cluster.nodes.get(body.node)
    same_life = known is not None and known.incarnation == body.incarnation
    others = {region.offer.region_id for region in state.cluster.regions.values() if region.node != body.node}
    if len(set(ids)) != len(ids) or others.intersection(ids):
        raise RefusedError(RefusalCode.BAD_REQUEST, "a region id is offered twice")
    if known is not None and known.state is not NodeState.DEAD:
        if same_life:
            _alive(known, peer, now_ns)
            return Registered(heartbeat_ns=config.heartbeat_ns, dead_ns=config.dead_ns)
        raise RefusedError(
            RefusalCode.NODE_NAME_TAKEN,
            f"a node named {body.node!r} is alive (heard {(now_ns - known.last_seen_ns) / 1e9:.1f} s ago); "
            f"use another name, or wait {config.dead_ns / 1e9:.1f} s after it has stopped",
            retry_after_s=max(0, known.last_seen_ns + config.dead_ns - now_ns) / 1e9,
        )
    if same_life:
        raise _stale(body.node)
    node = Node(body.node, body.incarnation, body.host, peer, NodeState.ACTIVE, last_seen_ns=now_ns, joined_ns=now_ns)
    node.transports = tuple(body.transports)
    state.cluster.add_node(node, body.regions)
    state.log(
        "info",
        "node_joined",
        node=node.name,
        regions=len(body.regions),
        bytes=sum(offer.size_bytes for offer in body.regions),
    )
    for namespace in state.namespaces.values():
        if not any(state.cluster.regions[number].node == node.name for number in namespace.regions):
            fresh = [region for region in state.cluster.assignable(namespace) if region.node == node.name]
            if fresh:
                assign(state, namespace, fresh[0], now_ns)
    return Registered(heartbeat_ns=config.heartbeat_ns, dead_ns=config.dead_ns)


def heartbeat(state: State, peer: bytes, body: Heartbeat, now_ns: int) -> Done:
    """A node lives.

    Raises:
        RefusedError: it is unknown here, or was declared dead: it must register (again, as a new incarnation).
    """
    _alive(_node(state, body.node, body.incarnation), peer, now_ns)
    return Done()


def unregister(state: State, body: Unregister, now_ns: int) -> Done:
    """A node leaves in good order."""
    node = _node(state, body.node, body.incarnation)
    lose(state, node, "node_left")
    del state.cluster.nodes[node.name]
    return Done()


def drain(state: State, body: NodeDrain, now_ns: int) -> Done:
    """No new blocks on a node, or again.

    Raises:
        RefusedError: no such living node.
    """
    node = state.cluster.nodes.get(body.node)
    if node is None or node.state is NodeState.DEAD:
        known = ", ".join(sorted(state.cluster.nodes)) or "none"
        raise RefusedError(RefusalCode.UNKNOWN_NODE, f"no living node {body.node!r} (known: {known})")
    node.state = NodeState.ACTIVE if body.undo else NodeState.DRAINING
    state.log("info", "node_active" if body.undo else "node_draining", node=node.name)
    for namespace in _users(state, node):
        changed(state, namespace)
    return Done()


def bury(state: State, now_ns: int) -> None:
    """Declare silent nodes dead."""
    for node in list(state.cluster.nodes.values()):
        if node.state is not NodeState.DEAD and now_ns - node.last_seen_ns >= state.config.dead_ns:
            lose(state, node, "node_died")
            node.state = NodeState.DEAD


def lose(state: State, node: Node, why: str) -> None:
    """All memory of a node is gone: its blocks are misses, leases over them are void."""
    users = _users(state, node)
    table = state.table
    lost = 0
    for number in node.regions:
        region = state.cluster.regions[number]
        if region.layout is None or region.namespace is None:
            continue
        namespace = state.owner(region.namespace)
        slots = np.arange(region.base, region.base + region.block_count, dtype=np.int32)
        slots = slots[table.state[slots] != SlotState.FREE]
        kind = table.state[slots]
        complete = slots[kind == SlotState.COMPLETE]
        visible = slots[(kind == SlotState.COMPLETE) | (kind == SlotState.WRITING)]
        namespace.index.erase(table.key, visible)
        state.publish_removed(namespace, complete, "lost")
        lost += len(complete)
        namespace.writing -= int((kind == SlotState.WRITING).sum())
        namespace.doomed -= int((kind == SlotState.DOOMED).sum())
        namespace.quarantined -= int((kind == SlotState.QUARANTINED).sum())
        table.free(slots)
        table.revoke(slots)
        namespace.regions.discard(number)
    state.cluster.remove_regions(node)
    introductions.lose(state, node.name)
    state.commands.forget(node.name)
    state.log("warning" if why == "node_died" else "info", why, node=node.name, lost_blocks=lost)
    for namespace in users:
        changed(state, namespace)


def _users(state: State, node: Node) -> list[Namespace]:
    mine = set(node.regions)
    everyone = [*state.namespaces.values(), *state.retiring.values()]
    return [namespace for namespace in everyone if namespace.regions & mine]


def _node(state: State, name: str, incarnation: int) -> Node:
    node = state.cluster.nodes.get(name)
    if node is None:
        raise RefusedError(RefusalCode.UNKNOWN_NODE, f"node {name[:80]!r} is not registered here; register")
    if node.incarnation != incarnation or node.state is NodeState.DEAD:
        raise _stale(name)
    return node


def _stale(name: str) -> RefusedError:
    return RefusedError(
        RefusalCode.STALE_INCARNATION,
        f"this life of node {name[:80]!r} was declared dead; register again with fresh regions",
    )


def _alive(node: Node, peer: bytes, now_ns: int) -> None:
    node.peer = peer
    node.last_seen_ns = max(node.last_seen_ns, now_ns)
