"""The ``memfabric`` command.

Responsible for words: options in, calls of the client, the server or a node, and text or JSON out. It holds no logic
that a Python caller would miss. Importing it is cheap: what a command needs is imported when the command runs.
"""

from __future__ import annotations

from memfabric.cli.root import cli

__all__ = ["cli", "main"]


def main() -> None:
    """Run the command line of this process and exit."""
    cli.main(prog_name="memfabric")
