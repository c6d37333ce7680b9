"""What runs while points are measured: clients, and an owner of a region or a pool.

Everything ends with the context."""

from __future__ import annotations

import abc
import inspect
import secrets
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from memfabric import NamespaceSpec
from memfabric.client import AdminClient
from memfabric.errors import MemfabricError, OutcomeUnknownError, RefusalCode, RefusedError, UnavailableError
from memfabric.perf import machine, messages
from memfabric.perf.children import Child, PointError, SettingError, ask
from memfabric.perf.plan import Plan, Point, Setting, lent_bytes, set_bytes
from memfabric.perf.pool import BenchPool
from memfabric.perf.stream import far_end
from transport import registry
from transport.errors import TransportError

OPEN_S = 120.0
ALIVE_S = 10.0
_LOCAL = ("tcp://127.", "tcp://localhost:", "tcp://[::1]", "ipc://")


class Site(abc.ABC):
    """A setting that is up. A context manager.

    Attributes:
        clients: as many as any of its points needs.
        info: what the transport is made of; on both sides the same.
        left_behind: namespaces that could not be removed.
    """

    def __init__(self, plan: Plan, setting: Setting, points: Sequence[Point]) -> None:
        """Start everything.

        Raises:
            SettingError: something does not start, or the transport can't be used; says why.
        """
        self.sweep, self.setting = plan.sweep, setting
        self.fabric = plan.sweep.fabric(setting.transport)
        self.clients: list[Child] = []
        self.info: dict[str, str] = {}
        self.left_behind: list[str] = []
        self._stack = ExitStack()
        try:
            self._open(points)
            count = max(point.clients for point in points)
            ports = [self._stack.enter_context(far_end("127.0.0.1")) if self._same_host() else 0 for _ in range(count)]
            for number in range(count):
                name = f"client {number}" if count > 1 else "the client"
                self.clients.append(self._stack.enter_context(Child(name, "client")))
            orders = [self._order(port) for port in ports]
            opened = ask(self.clients, orders, messages.Opened, OPEN_S, self.exchange)
            self.info = self.info or opened[0].info
        except PointError as error:
            self.close()
            raise SettingError(str(error)) from error
        except (MemfabricError, TransportError, OSError, subprocess.SubprocessError) as error:
            self.close()
            raise SettingError(str(error)) from error
        except BaseException:
            self.close()
            raise

    def options(self) -> dict[str, Any]:
        """For making the transport, on both sides; regions are where the sweep's are."""
        found = self.fabric.arguments()
        if self.fabric.name != "auto" and "directory" in inspect.signature(registry.find(self.fabric.name)).parameters:
            found.setdefault("directory", str(self.sweep.directory))
        return found

    def close_clients(self) -> None:
        """End them now."""
        for child in self.clients:
            child.close()

    def close(self) -> None:
        """End everything."""
        self._stack.close()

    def __enter__(self) -> Site:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abc.abstractmethod
    def _open(self, points: Sequence[Point]) -> None:
        """Start the other side."""

    @abc.abstractmethod
    def _order(self, stream_port: int) -> messages.OpenRegion | messages.OpenPool:
        """What a client is told first."""

    def _same_host(self) -> bool:
        """Whether a socket over the loopback says anything about this setting."""
        return True

    def exchange(self, asked: messages.Exchange) -> messages.Welcome:
        """Answer what a client asks of the owner while it connects."""
        return messages.Welcome(error="there is no owner to ask")

    @abc.abstractmethod
    def node_cpu_s(self) -> float | None:
        """Processor time that the memory nodes have used; None where they are not ours to look at."""

    @abc.abstractmethod
    def check(self) -> None:
        """After something went wrong.

        Raises:
            SettingError: the other side is gone, so that nothing else will work either.
        """

    @abc.abstractmethod
    def place(self, point: Point) -> Any:
        """A context in which a point can be prepared; gives the name of its namespace."""

    def span(self, point: Point, number: int) -> tuple[int, int]:
        """A client's part of the region."""
        size = set_bytes(self.sweep, point)
        return number * size, size


class RegionSite(Site):
    """An owner that lends one region."""

    def _open(self, points: Sequence[Point]) -> None:
        self._owner = self._stack.enter_context(Child("the owner", "owner"))
        size = max(lent_bytes(self.sweep, point) for point in points)
        order = messages.Lend(transport=self.fabric.name, options=self.options(), size_bytes=size)
        [lent] = ask([self._owner], [order], messages.Lent, OPEN_S)
        self._descriptor, self.info = lent.descriptor, lent.info

    def _order(self, stream_port: int) -> messages.OpenRegion:
        return messages.OpenRegion(
            transport=self.fabric.name,
            options=self.options(),
            descriptor=self._descriptor,
            kind=self.setting.kind,
            stream_port=stream_port,
        )

    def exchange(self, asked: messages.Exchange) -> messages.Welcome:
        """Carry a hello to the owner and its welcome back."""
        left_s = max(0.1, (asked.deadline_ns - time.monotonic_ns()) / 1e9) if asked.deadline_ns else OPEN_S
        order = messages.Accept(hello=asked.hello, identity=asked.identity)
        [answer] = ask([self._owner], [order], messages.Welcome, min(OPEN_S, left_s))
        return answer

    def node_cpu_s(self) -> float | None:
        return cpu_of([self._owner.pid])

    def check(self) -> None:
        ask([self._owner], [messages.Finish()], messages.Done, ALIVE_S)

    @contextmanager
    def place(self, point: Point) -> Iterator[str]:
        yield ""


class PoolSite(Site):
    """A pool: one of our own, or one that was there before, in which every point has a namespace of its own."""

    def _open(self, points: Sequence[Point]) -> None:
        self._pool: BenchPool | None = None
        if self.sweep.address is not None:
            self._address = self.sweep.address
            self._admin = self._stack.enter_context(AdminClient(self._address, name="memfabric-perf"))
            return
        size = max(lent_bytes(self.sweep, point) for point in points)
        self._pool = self._stack.enter_context(
            BenchPool(size, self.sweep.directory, self.setting.nodes, self.fabric.name)
        )
        self._address = self._pool.address
        self._admin = self._stack.enter_context(AdminClient(self._address, name="memfabric-perf"))

    def _order(self, stream_port: int) -> messages.OpenPool:
        return messages.OpenPool(
            address=self._address,
            transport=self.fabric.name,
            options=self.fabric.arguments(),
            directory=str(self.sweep.directory),
            kind=self.setting.kind,
            stream_port=stream_port,
        )

    def _same_host(self) -> bool:
        return self._address.startswith(_LOCAL)

    def node_cpu_s(self) -> float | None:
        if self._pool is None:
            return None
        return cpu_of([pid for name, pid in self._pool.pids.items() if name != "meta"])

    def check(self) -> None:
        try:
            if self._pool is not None:
                self._pool.check()
            self._admin.status()
        except MemfabricError as error:
            raise self._gone(error) from error

    @contextmanager
    def place(self, point: Point) -> Iterator[str]:
        """A namespace that is gone afterwards.

        Raises:
            PointError: the pool refuses it. SettingError: the pool is gone.
        """
        name = f"perf-{secrets.token_hex(6)}"
        wanted = set_bytes(self.sweep, point) * point.clients
        # Nothing is evicted ahead of need; in somebody else's pool it takes no more than it must.
        quota = 0 if self._pool is not None else 2 * wanted
        spec = NamespaceSpec(name=name, block_bytes=point.block_bytes, high_ratio=1.0, low_ratio=1.0, quota_bytes=quota)
        try:
            self._admin.namespace_create(spec)
        except RefusedError as error:
            raise PointError(f"the pool refuses a namespace: {error}") from error
        except MemfabricError as error:
            if isinstance(error, OutcomeUnknownError):
                self.left_behind.append(name)
            raise self._gone(error) from error
        try:
            yield name
        except PointError:
            self._drop(name)
            raise
        except BaseException:
            self.close_clients()  # before their namespace goes
            try:
                self._drop(name)
            except SettingError:
                pass  # it is noted as left behind, and what is under way says more
            raise
        self._drop(name)

    def _drop(self, name: str) -> None:
        try:
            self._admin.namespace_delete(name, force=True)
        except RefusedError as error:
            if error.code != RefusalCode.UNKNOWN_NAMESPACE:
                self.left_behind.append(name)
                raise self._gone(error) from error
        except MemfabricError as error:
            self.left_behind.append(name)
            raise self._gone(error) from error

    def _gone(self, error: MemfabricError) -> SettingError:
        said = ""
        if self._pool is not None:
            try:
                self._pool.check()
            except UnavailableError as ended:
                said = f"; {ended}"
        return SettingError(f"the pool at {self._address} cannot be used any more: {error}{said}")


def cpu_of(pids: Sequence[int]) -> float | None:
    """Processor time of processes; None when one of them is gone."""
    try:
        return sum(machine.cpu_s(pid) for pid in pids)
    except OSError:
        return None
