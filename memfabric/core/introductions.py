"""Introductions: a client's hello is carried to the node that it is for, and the node's welcome back.

Pure. For transports whose two sides must meet before they can reach one another (RDMA queue pairs). What the frames
hold is the transport's own affair. A node that does not answer in time, or is gone, is a refusal; a hello that is sent
again is carried once.
"""

from __future__ import annotations

from memfabric.core.cluster import Node
from memfabric.core.commands import Asker, PendingCommand
from memfabric.core.messages import Accept, CommandDone, Introduce, Introduced, NodeState, Refused, Reply, ReplyBody
from memfabric.core.rights import namespace_of
from memfabric.core.sessions import Session
from memfabric.core.state import Send, State
from memfabric.errors import RefusalCode, RefusedError

IDENTITY_BYTES = 16
MAX_HELLO_BYTES, MAX_WELCOME_BYTES = 256 << 10, 1 << 20
MAX_WAITING = 4096
"""Hellos on their way at once."""
ANSWER_NS = 10_000_000_000
"""How long a node may take to answer."""


def introduce(state: State, session: Session, sequence: int, peer: bytes, body: Introduce, now_ns: int) -> None:
    """Send a client's hello on its way; the answer comes by `answered`.

    Raises:
        RefusedError: the node is not one of the session's namespace, or lives no more in that life; or a bad field.
    """
    if len(body.identity) != IDENTITY_BYTES or not 0 < len(body.hello) <= MAX_HELLO_BYTES:
        raise RefusedError(
            RefusalCode.BAD_REQUEST,
            f"an introduction has {IDENTITY_BYTES} bytes of identity and 1 to {MAX_HELLO_BYTES} of hello",
        )
    node = _node_for(state, session, body)
    waiting = [asker for _, asker in state.commands.asked()]
    if any((asker.session, asker.sequence) == (session.id, sequence) for asker in waiting):
        return
    if len(waiting) >= MAX_WAITING:
        raise RefusedError(RefusalCode.OVERLOADED, "too many clients are connecting to nodes", retry_after_s=0.1)
    accept = Accept(identity=body.identity, hello=body.hello)
    asker = Asker(session.id, sequence, peer, now_ns + ANSWER_NS)
    command = state.commands.new(state.config.epoch, node.name, node.incarnation, None, accept, now_ns, asker)
    state.emit(Send(node.peer, command))


def _node_for(state: State, session: Session, body: Introduce) -> Node:
    namespace = namespace_of(state, session)
    node = state.cluster.nodes.get(body.node)
    if node is None or not any(state.cluster.regions[number].node == node.name for number in namespace.regions):
        raise RefusedError(RefusalCode.UNKNOWN_NODE, f"no node {body.node[:80]!r} holds regions of this namespace")
    if node.incarnation != body.incarnation or node.state is NodeState.DEAD:
        raise RefusedError(RefusalCode.STALE_INCARNATION, f"that life of node {node.name!r} is over")
    return node


def answered(state: State, waiting: PendingCommand, done: CommandDone) -> None:
    """The node has accepted, or refused."""
    assert waiting.asker is not None
    if done.error:
        body: ReplyBody = Refused(code=RefusalCode.NOT_ALLOWED, message=f"node {waiting.node}: {done.error[:1000]}")
    elif not 0 < len(done.answer) <= MAX_WELCOME_BYTES:
        body = _gone(waiting.node, "answered with a welcome of an impossible length")
    else:
        body = Introduced(welcome=done.answer)
    _reply(state, waiting.asker, body)


def expire(state: State, now_ns: int) -> None:
    """Nodes that were silent for too long."""
    for waiting, asker in state.commands.asked():
        if now_ns >= asker.until_ns or asker.session not in state.sessions:
            state.commands.drop(waiting)
            _reply(state, asker, _gone(waiting.node, f"did not answer within {ANSWER_NS / 1e9:g} s"))


def lose(state: State, node: str) -> None:
    """A node is gone."""
    for waiting, asker in state.commands.asked():
        if waiting.node == node:
            state.commands.drop(waiting)
            _reply(state, asker, _gone(node, "is gone"))


def _gone(node: str, why: str) -> Refused:
    return Refused(code=RefusalCode.UNKNOWN_NODE, message=f"node {node} {why}")


def _reply(state: State, asker: Asker, body: ReplyBody) -> None:
    session = state.sessions.find(asker.session)
    if session is None:
        return
    session.remember(asker.sequence, body)
    reply = Reply(session=asker.session, sequence=asker.sequence, epoch=state.config.epoch, body=body)
    state.emit(Send(asker.peer, reply))
