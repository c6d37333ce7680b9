"""Introductions: a hello goes to the node, its welcome comes back; once, in time, and to nobody else."""

from __future__ import annotations

from typing import Any

import pytest

from memfabric.core import introductions
from memfabric.core import messages as m
from memfabric.errors import RefusalCode
from tests.core.harness import Harness

ME = bytes(range(16))


@pytest.fixture
def pool() -> Harness:
    made = Harness()
    made.join("a")
    return made


def introduce(pool: Harness, session: int, **other: Any) -> Any:
    fields: dict[str, Any] = {"node": "a", "incarnation": pool.nodes["a"], "identity": ME, "hello": b"hello", **other}
    return pool.ask(m.Introduce(**fields), session=session)


def hellos(pool: Harness) -> list[m.Command]:
    return [each for each in pool.commands if isinstance(each.body, m.Accept)]


def answer(pool: Harness, command: m.Command, **fields: Any) -> Any:
    done = m.CommandDone(node="a", incarnation=command.incarnation, command=command.command, **fields)
    return pool.ask(done, peer=b"a")


def test_a_hello_goes_there_and_its_welcome_back(pool: Harness) -> None:
    session = pool.attach()
    pool.deaf.add("a")
    assert introduce(pool, session) is None, "the node has the word"
    asked = pool.last_sequence
    (command,) = hellos(pool)
    assert (command.body.identity, command.body.hello) == (ME, b"hello")
    assert answer(pool, command, answer=b"welcome") == m.Done()
    assert pool.replies[asked] == m.Introduced(welcome=b"welcome")
    assert pool.repeat(asked) == m.Introduced(welcome=b"welcome"), "the same request again"
    assert len(hellos(pool)) == 1
    assert answer(pool, command, answer=b"another") == m.Done(), "the node's answer again"
    assert pool.repeat(asked) == m.Introduced(welcome=b"welcome")


def test_a_request_that_is_sent_again_while_it_waits_is_carried_once(pool: Harness) -> None:
    session = pool.attach()
    pool.deaf.add("a")
    introduce(pool, session)
    assert pool.repeat(pool.last_sequence) is None
    assert len(hellos(pool)) == 1


def test_a_command_that_was_lost_is_sent_again(pool: Harness) -> None:
    session = pool.attach()
    pool.deaf.add("a")
    introduce(pool, session)
    pool.tick(1200)
    assert len(hellos(pool)) == 2
    assert len({each.command for each in hellos(pool)}) == 1


def test_what_the_node_refuses_is_refused(pool: Harness) -> None:
    session = pool.attach()
    pool.deaf.add("a")
    introduce(pool, session)
    asked = pool.last_sequence
    answer(pool, hellos(pool)[0], error="no such transport")
    refused = pool.replies[asked]
    assert isinstance(refused, m.Refused)
    assert "no such transport" in refused.message


@pytest.mark.parametrize("welcome", [b"", bytes(introductions.MAX_WELCOME_BYTES + 1)])
def test_an_impossible_welcome_is_a_refusal(pool: Harness, welcome: bytes) -> None:
    session = pool.attach()
    pool.deaf.add("a")
    introduce(pool, session)
    asked = pool.last_sequence
    answer(pool, hellos(pool)[0], answer=welcome)
    assert isinstance(pool.replies[asked], m.Refused)


def test_a_silent_node_is_a_refusal_in_time(pool: Harness) -> None:
    session = pool.attach()
    pool.deaf.add("a")
    introduce(pool, session)
    asked = pool.last_sequence
    for _ in range(11):
        pool.ask(m.Ping(), session=session)
        pool.tick(1000)
    refused = pool.replies[asked]
    assert isinstance(refused, m.Refused)
    assert "did not answer" in refused.message
    assert answer(pool, hellos(pool)[0], answer=b"late") == m.Done(), "a late answer harms nobody"
    assert pool.repeat(asked) == refused


def test_a_node_that_dies_or_leaves_is_a_refusal(pool: Harness) -> None:
    session = pool.attach()
    for leave in (False, True):
        pool.deaf.add("a")
        introduce(pool, session)
        asked, incarnation = pool.last_sequence, pool.nodes.pop("a")
        if leave:
            pool.ask(m.Unregister(node="a", incarnation=incarnation), peer=b"a")
        else:
            pool.tick(3000)
        refused = pool.replies[asked]
        assert isinstance(refused, m.Refused)
        assert refused.code == RefusalCode.UNKNOWN_NODE
        pool.deaf.clear()
        pool.join("a", incarnation=incarnation + 1)


def test_a_client_that_leaves_gets_no_answer(pool: Harness) -> None:
    session = pool.attach()
    pool.deaf.add("a")
    introduce(pool, session)
    asked = pool.last_sequence
    pool.ask(m.Detach(), session=session)
    answer(pool, hellos(pool)[0], answer=b"welcome")
    assert asked not in pool.replies
    pool.tick(200)
    assert not pool.core.state.commands.asked()


@pytest.mark.parametrize(
    "bad",
    [
        {"identity": b"short"},
        {"hello": b""},
        {"hello": bytes(introductions.MAX_HELLO_BYTES + 1)},
        {"node": "nobody"},
        {"incarnation": 1},
    ],
)
def test_bad_introductions_are_refused(pool: Harness, bad: dict[str, Any]) -> None:
    session = pool.attach()
    assert isinstance(introduce(pool, session, **bad), m.Refused)
    assert not hellos(pool)


def test_nodes_of_other_namespaces_and_administrators_are_no_way_in() -> None:
    pool = Harness()
    pool.join("a", regions=1)
    pool.attach("first")
    other = pool.attach("second", peer=b"other")  # the only region is the first one's
    body = m.Introduce(node="a", incarnation=pool.nodes["a"], identity=ME, hello=b"h")
    refused = pool.ask(body, session=other, peer=b"other")
    assert isinstance(refused, m.Refused)
    assert refused.code == RefusalCode.UNKNOWN_NODE
    admin = pool.ask(m.Attach(nonce=b"admin"), peer=b"admin")
    refused = pool.ask(body, session=admin.session, peer=b"admin")
    assert isinstance(refused, m.Refused)
    assert refused.code == RefusalCode.NOT_ALLOWED


def test_only_so_many_wait(pool: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(introductions, "MAX_WAITING", 3)
    session = pool.attach()
    pool.deaf.add("a")
    for _ in range(3):
        assert introduce(pool, session) is None
    refused = introduce(pool, session)
    assert isinstance(refused, m.Refused)
    assert refused.code == RefusalCode.OVERLOADED
    assert refused.retry_after_ns > 0
