"""Commands to nodes that were not answered yet.

Pure. A command is sent again until its node answers or dies; nodes do a repeated command once.
"""

from __future__ import annotations

import dataclasses

from memfabric.core.messages import Accept, Assign, Command, Unassign

RESEND_NS = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class Asker:
    """Whose request is answered by a command's answer: an introduction's. It is refused at `until_ns`."""

    session: int
    sequence: int
    peer: bytes
    until_ns: int


@dataclasses.dataclass
class PendingCommand:
    """A command on its way. `region`: which it is about, if it is about one."""

    command: Command
    node: str
    region: int | None
    sent_ns: int
    asker: Asker | None = None


class Commands:
    """Commands in flight, by id."""

    def __init__(self) -> None:
        self._next_id = 1
        self._pending: dict[int, PendingCommand] = {}

    def new(
        self,
        epoch: int,
        node: str,
        incarnation: int,
        region: int | None,
        body: Assign | Unassign | Accept,
        now_ns: int,
        asker: Asker | None = None,
    ) -> Command:
        """A command that waits for an answer from now on."""
        command = Command(command=self._next_id, epoch=epoch, incarnation=incarnation, body=body)
        self._next_id += 1
        self._pending[command.command] = PendingCommand(command, node, region, now_ns, asker)
        return command

    def done(self, command: int, node: str) -> PendingCommand | None:
        """The node answered; None if that was known already."""
        waiting = self._pending.get(command)
        if waiting is None or waiting.node != node:
            return None
        return self._pending.pop(command)

    def asked(self) -> list[tuple[PendingCommand, Asker]]:
        """Those that somebody waits for."""
        return [(waiting, waiting.asker) for waiting in self._pending.values() if waiting.asker is not None]

    def drop(self, waiting: PendingCommand) -> None:
        """Nobody waits for its answer any more."""
        del self._pending[waiting.command.command]

    def overdue(self, now_ns: int) -> list[PendingCommand]:
        """What to send again now."""
        out = [waiting for waiting in self._pending.values() if now_ns - waiting.sent_ns >= RESEND_NS]
        for waiting in out:
            waiting.sent_ns = now_ns
        return out

    def forget(self, node: str) -> None:
        """The node is gone."""
        self._pending = {i: waiting for i, waiting in self._pending.items() if waiting.node != node}

    def next_deadline_ns(self) -> int | None:
        """When something is overdue."""
        return min((waiting.sent_ns + RESEND_NS for waiting in self._pending.values()), default=None)
