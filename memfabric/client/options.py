"""What `connect` takes, checked and resolved once."""

from __future__ import annotations

import os
import sys

from memfabric.client.address import server_address
from memfabric.client.engine import Engine, Settings
from memfabric.core.fingerprint import Fingerprint
from memfabric.core.messages import Attach, NamespaceSpec
from memfabric.errors import UsageError
from transport.shm import ShmTransport

DIRECTORY_VARIABLE = "MEMFABRIC_SHM_DIRECTORY"
DEFAULT_DIRECTORY = "/dev/shm"
MAX_COPY_THREADS = 64


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
    return Engine(server_address(address), attach, ShmTransport(directory), settings)
