"""What `connect` takes, checked and resolved once."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from memfabric.client.address import server_address
from memfabric.client.engine import Engine, Settings
from memfabric.core.fingerprint import Fingerprint
from memfabric.core.messages import Attach, NamespaceSpec
from memfabric.errors import UsageError
from transport import registry
from transport.auto import AutoTransport, Choice
from transport.errors import UnsupportedError

DIRECTORY_VARIABLE = "MEMFABRIC_SHM_DIRECTORY"
DEFAULT_DIRECTORY = "/dev/shm"
MAX_COPY_THREADS = 64
TRANSPORT_VARIABLE = "MEMFABRIC_TRANSPORT"
AUTO = "auto"

_log = logging.getLogger("memfabric.client")


def client_name(name: str | None) -> str:
    """How the server's log and status call this client."""
    return name or f"{os.path.basename(sys.argv[0]) or 'python'}:{os.getpid()}"  # noqa: PTH119  # not a path we open


def open_engine(
    address: str | None,
    namespace: str,
    fingerprint: Fingerprint | None,
    create: NamespaceSpec | None,
    timeout_s: float,
    verify: bool,
    copy_threads: int,
    name: str | None,
    shm_directory: str | None,
    transport: str | Sequence[str] | None,
    transport_options: Mapping[str, Mapping[str, Any]] | None,
) -> Engine:
    """Attach to a namespace; see `sync.connect`."""
    if not isinstance(namespace, str) or not namespace:
        raise UsageError(f"namespace must be a name, got {namespace!r}")
    if not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < 1e9:
        raise UsageError(f"timeout_s must be above 0, got {timeout_s!r}")
    if not 0 <= copy_threads <= MAX_COPY_THREADS:
        raise UsageError(f"copy_threads must be 0 (automatic) to {MAX_COPY_THREADS}, got {copy_threads}")
    directory = shm_directory or os.environ.get(DIRECTORY_VARIABLE, "") or DEFAULT_DIRECTORY
    attach = Attach(nonce=b"", client=client_name(name), namespace=namespace, fingerprint=fingerprint, create=create)
    settings = Settings(verify=verify, copy_threads=copy_threads, timeout_ns=int(timeout_s * 1e9))
    made = open_transport(directory, transport, transport_options)
    try:
        return Engine(server_address(address), attach, made, settings)
    except BaseException:
        made.close()
        raise


def open_transport(
    directory: str, wanted: str | Sequence[str] | None, options: Mapping[str, Mapping[str, Any]] | None
) -> AutoTransport:
    """The client's transports.

    Raises:
        UsageError: A name or an option is wrong, or a transport that was named cannot be used here.
    """
    names = wanted or os.environ.get(TRANSPORT_VARIABLE, "") or AUTO
    chosen = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    given = {name: dict(each) for name, each in (options or {}).items()}
    unknown = [name for name in given if name not in registry.names()]
    if unknown:
        raise UsageError(f"transport_options: no transport {unknown[0]!r}; there are: {', '.join(registry.names())}")
    given["shm"] = {"directory": directory, **given.get("shm", {})}
    try:
        return AutoTransport(None if chosen == [AUTO] else chosen, given, _tell)
    except (UnsupportedError, ValueError, TypeError) as error:
        raise UsageError(f"transport {', '.join(chosen)}: {error}") from error


def _tell(choice: Choice) -> None:
    against = "; ".join(f"not {name}: {why}" for name, why in choice.instead_of.items())
    _log.info("reached by %s (%s)%s", choice.transport, choice.data_path, f"; {against}" if against else "")
