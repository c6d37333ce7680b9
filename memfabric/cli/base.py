"""What all commands share: settings, options, parameter types, and the way to a client.

Settings are resolved once, in this order: default, environment, option before the command, option after it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from memfabric import units
from memfabric.errors import UsageError

if TYPE_CHECKING:
    from memfabric.client import AdminClient, Client

    _IntType = click.ParamType[int]
    _BytesType = click.ParamType[bytes]
else:
    # generic only for type checkers in the oldest click that is supported
    _IntType = _BytesType = click.ParamType

DEFAULT_ADDRESS = "tcp://127.0.0.1:7170"
DEFAULT_TIMEOUT_S = 5.0
_ADDRESS = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.%a-z]+\]|[^\s:/\[\]]+):(?P<port>auto|\*|[0-9]{1,5})")

C = TypeVar("C", bound=Callable[..., Any])
R = TypeVar("R")


@dataclass
class Settings:
    """Options that may stand before or after the command.

    Attributes:
        address: as given; None for the default.
        timeout_ns: how long to wait for the server; None for the command's default.
        as_json: print JSON instead of text.
        debug: let errors through with their traceback.
    """

    address: str | None = None
    timeout_ns: int | None = None
    as_json: bool = False
    debug: bool = False

    @property
    def server(self) -> str:
        """Address of a running server.

        Raises:
            click.BadParameter: not an address, or one whose port is still to be chosen.
        """
        address = _check_address(self.address or DEFAULT_ADDRESS)
        if address.endswith((":auto", ":*", ":0")):
            raise _bad_address(f"{address!r} has no port; give the one that the server printed")
        return address

    @property
    def bind(self) -> str:
        """Address to serve at; port 0 means that the system shall choose one."""
        address = _check_address(self.address or DEFAULT_ADDRESS)
        for free in (":auto", ":*"):
            address = address.removesuffix(free) + (":0" if address.endswith(free) else "")
        return address

    @property
    def timeout_s(self) -> float:
        """`timeout_ns` in the client's unit, with the default of commands that ask a server."""
        return DEFAULT_TIMEOUT_S if self.timeout_ns is None else self.timeout_ns / 1e9

    def admin(self) -> AdminClient:
        """A client for administration (a context manager).

        Raises:
            UnavailableError: no server answers within the timeout.
        """
        from memfabric.client import AdminClient

        return AdminClient(self.server, timeout_s=self.timeout_s)

    def client(self, namespace: str, directory: str | None = None) -> Client:
        """A client of a namespace (a context manager); `directory` is where nodes of this host keep shared memory.

        Raises:
            UnavailableError: no server answers within the timeout.
            RefusedError: there is no such namespace.
        """
        from memfabric.client import connect

        return connect(self.server, namespace=namespace, timeout_s=self.timeout_s, shm_directory=directory)


def pass_settings(command: Callable[..., R]) -> Callable[..., R]:
    """Give the command the settings as its first argument (after the context, if it takes one)."""

    @functools.wraps(command)
    def call(*arguments: Any, **options: Any) -> R:
        return command(*arguments, click.get_current_context().ensure_object(Settings), **options)

    return call


class SizeType(_IntType):
    """Bytes, written as `units.parse_bytes` reads them."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Text to bytes; numbers (defaults) pass."""
        if isinstance(value, int):
            return value
        try:
            return units.parse_bytes(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class DurationType(_IntType):
    """Nanoseconds, written as `units.parse_duration_ns` reads them; a plain number counts seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Text to nanoseconds; numbers (defaults, already nanoseconds) pass."""
        if isinstance(value, int):
            return value
        plain = re.fullmatch(r"\s*[0-9.]+\s*", value) is not None
        try:
            return units.parse_duration_ns(f"{value}s" if plain else value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class KeyType(_BytesType):
    """A block key: 32 hexadecimal digits."""

    name = "key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """Text to 16 bytes."""
        if isinstance(value, bytes):
            return value
        try:
            return parse_key(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


SIZE = SizeType()
DURATION = DurationType()
KEY = KeyType()


def parse_key(text: str) -> bytes:
    """A block key from its 32 hexadecimal digits.

    Raises:
        UsageError: says which character or what length is wrong.
    """
    digits = text.strip()
    for position, character in enumerate(digits):
        if character not in "0123456789abcdefABCDEF":
            raise UsageError(
                f"{_clip(digits)!r} is not a block key: character {position + 1} is {character!r}, "
                "a key has 32 hexadecimal digits"
            )
    if len(digits) != 32:
        raise UsageError(f"{_clip(digits)!r} is not a block key: it has {len(digits)} hexadecimal digits, a key has 32")
    return bytes.fromhex(digits)


def common_options(
    *,
    json: bool = False,
    server: bool = True,
    address: str = "The pool's metadata server.",
    default: bool = True,
    environment: bool = False,
) -> Callable[[C], C]:
    """The options that every command takes; their values go to `Settings`, not to the command.

    Args:
        json: the command prints data, so it has ``--json``.
        server: it talks to a server or is one, so it has ``--address`` and ``--timeout``.
        address: what ``--address`` means for the command.
        default: the command takes `DEFAULT_ADDRESS` where none is given; else it does without a server.
        environment: look at the environment (the root only: what stands on the command line must win).
    """
    options: list[Callable[[C], C]] = []
    if server:
        options += [
            click.option(
                "-a",
                "--address",
                metavar="ADDRESS",
                expose_value=False,
                envvar="MEMFABRIC_ADDRESS" if environment else None,
                callback=_store("address"),
                help=f"{address}  [default: $MEMFABRIC_ADDRESS or {DEFAULT_ADDRESS if default else 'none'}]",
            ),
            click.option(
                "--timeout",
                type=DURATION,
                expose_value=False,
                callback=_store("timeout_ns"),
                help=f"How long to wait for the server.  [default: {DEFAULT_TIMEOUT_S:.0f}s]",
            ),
        ]
    options.append(_flag("--debug", "debug", "Show tracebacks of errors."))
    if json:
        options.append(_flag("--json", "as_json", "Print JSON."))

    def decorate(command: C) -> C:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def examples(text: str) -> str:
    """An epilog with examples; click keeps its lines as they are."""
    lines = ["\b", "Examples:", *(f"  {line}" for line in text.strip().splitlines())]
    return "\n".join(lines)


def _flag(option: str, setting: str, words: str) -> Callable[[C], C]:
    return click.option(option, is_flag=True, default=None, expose_value=False, callback=_store(setting), help=words)


def _store(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def store(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value is not None:
            setattr(ctx.ensure_object(Settings), name, value)

    return store


def _check_address(text: str) -> str:
    address = text.strip()
    if address == "auto":
        address = "tcp://127.0.0.1:auto"
    if "://" not in address:
        address = f"tcp://{address}"
    if address.startswith("ipc://") and len(address) > 6:
        return address
    match = _ADDRESS.fullmatch(address)
    if match is None or (match["port"].isdigit() and int(match["port"]) > 65535):
        raise _bad_address(f"{text!r} is not an address; write tcp://HOST:PORT, for example {DEFAULT_ADDRESS}")
    return address


def _bad_address(message: str) -> click.BadParameter:
    return click.BadParameter(message, param_hint="--address or MEMFABRIC_ADDRESS")


def _clip(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"
