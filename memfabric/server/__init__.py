"""The metadata server as a process: sockets, clock, files and signals around `memfabric.core`."""

from memfabric.server.options import ServerOptions
from memfabric.server.shell import Server, serve

__all__ = ["Server", "ServerOptions", "serve"]
