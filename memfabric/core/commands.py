"""Commands to nodes that were not answered yet.

Pure. A command is sent again until its node answers or dies; nodes do a repeated command once.
"""

from __future__ import annotations

import dataclasses

from memfabric.core.messages import Assign, Command, Unassign

RESEND_NS = 1_000_000_000


@dataclasses.dataclass
class PendingCommand:
    """A command on its way."""

    command: Command
    node: str
    region: int
    sent_ns: int


class Commands:
    """Commands in flight, by id."""

    def __init__(self) -> None:
        self._next_id = 1
        self._pending: dict[int, PendingCommand] = {}

    def new(
        self, epoch: int, node: str, incarnation: int, region: int, body: Assign | Unassign, now_ns: int
    ) -> Command:
        """A command that waits for an answer from now on."""
        command = Command(command=self._next_id, epoch=epoch, incarnation=incarnation, body=body)
        self._next_id += 1
        self._pending[command.command] = PendingCommand(command, node, region, now_ns)
        return command

    def done(self, command: int, node: str) -> PendingCommand | None:
        """The node answered; None if that was known already."""
        waiting = self._pending.get(command)
        if waiting is None or waiting.node != node:
            return None
        return self._pending.pop(command)

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
