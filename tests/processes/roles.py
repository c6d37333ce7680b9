"""What the children of `harness` run: ``python -m tests.processes.roles ROLE JSON``."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def say(**event: Any) -> None:
    """One line to the parent; whole, whatever thread says it."""
    os.write(1, json.dumps(event).encode() + b"\n")


def server(address: str, **options: Any) -> None:
    from memfabric.server import ServerOptions, serve

    if "state_dir" in options:
        options["state_dir"] = Path(options["state_dir"])
    serve(ServerOptions(address=address, **options), ready=lambda bound: say(event="ready", address=bound))


def node(directory: str, **options: Any) -> None:
    from memfabric.node import NodeOptions, serve_node

    serve_node(NodeOptions(directory=Path(directory), **options), ready=lambda: say(event="ready"))


def main() -> int:
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    faulthandler.enable()
    role, arguments = sys.argv[1], json.loads(sys.argv[2])
    try:
        if role in ("server", "node"):
            {"server": server, "node": node}[role](**arguments)
        else:
            from tests.processes import workers

            workers.ROLES[role](**arguments)
    except Exception as error:  # noqa: BLE001  # the parent wants to know which
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        say(event="failed", error=type(error).__name__, code=getattr(error, "code", ""), message=str(error))
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
