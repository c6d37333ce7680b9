"""Pinning blocks by hand."""

from __future__ import annotations

import click

from memfabric.cli.base import KEY, Settings, common_options, examples, pass_settings
from memfabric.cli.blocks import keys_option, namespace_option, wanted_keys
from memfabric.cli.output import emit_json, note, plural
from memfabric.errors import MemfabricError


def _pin(settings: Settings, namespace: str, keys: tuple[bytes, ...], keys_file: str | None, *, pinned: bool) -> None:
    wanted = wanted_keys(keys, keys_file)
    with settings.client(namespace) as client:
        found = (client.pin(wanted) if pinned else client.unpin(wanted)).found.tolist()
    if settings.as_json:
        emit_json([{"key": key.hex(), "found": there} for key, there in zip(wanted, found, strict=True)])
    note(f"{plural(sum(found), 'block')} {'pinned' if pinned else 'unpinned'}.")
    missing = [key.hex() for key, there in zip(wanted, found, strict=True) if not there]
    if missing:
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise MemfabricError(f"{plural(len(missing), 'key')} not in namespace {namespace}: {shown}")


@click.command(
    short_help="Keep blocks from being evicted.",
    epilog=examples(
        """
memfabric pin -n demo 6f1c0f2b8f0e4c6d9a7b5e3d1c2b4a69
memfabric pin -n demo --keys system-prompt.keys
"""
    ),
)
@namespace_option
@click.argument("keys", type=KEY, nargs=-1, metavar="[KEY]...")
@keys_option
@common_options(json=True)
@pass_settings
def pin(settings: Settings, namespace: str, keys: tuple[bytes, ...], keys_file: str | None) -> None:
    """Keep blocks from being evicted or expiring until they are unpinned or removed."""
    _pin(settings, namespace, keys, keys_file, pinned=True)


@click.command(
    short_help="Let blocks be evicted again.",
    epilog=examples("memfabric unpin -n demo 6f1c0f2b8f0e4c6d9a7b5e3d1c2b4a69"),
)
@namespace_option
@click.argument("keys", type=KEY, nargs=-1, metavar="[KEY]...")
@keys_option
@common_options(json=True)
@pass_settings
def unpin(settings: Settings, namespace: str, keys: tuple[bytes, ...], keys_file: str | None) -> None:
    """Let blocks be evicted again."""
    _pin(settings, namespace, keys, keys_file, pinned=False)
