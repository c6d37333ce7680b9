"""A memory node as a process: lends regions, formats them on command, says that it lives. No block passes it."""

from memfabric.node.options import NodeOptions
from memfabric.node.shell import Node, serve_node

__all__ = ["Node", "NodeOptions", "serve_node"]
