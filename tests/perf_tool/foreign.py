"""Transports of a third party, which sweeps find by their entry points: in a folder that is on the path of Python."""

from __future__ import annotations

from pathlib import Path

_MODULE = '''
import dataclasses

from transport import ShmTransport
from transport.errors import UnreachableError


class AskingTransport(ShmTransport):
    """Connects only after the owner has answered; keeps out whoever says nothing."""

    @property
    def capabilities(self):
        return dataclasses.replace(super().capabilities, name="asking", needs_exchange=True)

    def accept(self, hello, identity):
        assert len(identity) == 16
        if hello.startswith(b"go away"):
            raise UnreachableError("not for you")
        return hello + b", " + identity

    def connect(self, descriptor, *, writable, exchange=None, deadline_ns=0):
        assert exchange is not None
        assert exchange(b"hello", 0) == b"hello, " + self.identity
        return super().connect(descriptor, writable=writable)


class ShyTransport(AskingTransport):
    def connect(self, descriptor, *, writable, exchange=None, deadline_ns=0):
        return exchange(b"go away", 0)


class WrongTransport(ShmTransport):
    """Loses the last byte of what is read."""

    def post_read(self, batch, deadline_ns=0, threads=0):
        pending = super().post_read(batch, deadline_ns, threads)
        import ctypes

        ctypes.memset(int(batch.local[-1] + batch.length[-1]) - 1, 0, 1)
        return pending


class DyingTransport(ShmTransport):
    """Takes its process with it."""

    def post_read(self, batch, deadline_ns=0, threads=0):
        import os

        os.write(2, b"I am tired of this\\n")
        os._exit(7)


class ChattyTransport(ShmTransport):
    def __init__(self, directory="/dev/shm"):
        print("libraries say this and that", flush=True)
        super().__init__(directory)
'''


def install(folder: Path) -> None:
    """Make them known to processes that have the folder on their path."""
    (folder / "foreign_fabric.py").write_text(_MODULE)
    facts = folder / "foreign_fabric-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-fabric\nVersion: 1.0\n")
    names = ("Asking", "Shy", "Wrong", "Dying", "Chatty")
    lines = [f"{name.lower()} = foreign_fabric:{name}Transport" for name in names]
    (facts / "entry_points.txt").write_text("\n".join(["[memfabric.transports]", *lines, ""]))
