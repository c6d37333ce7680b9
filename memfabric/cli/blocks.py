"""``memfabric put|get|ls|rm|explain``: blocks by hand.

Data and keys go through standard output, everything said to people through standard error, so that the commands can
be piped into one another.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from memfabric import units
from memfabric.cli.base import KEY, SIZE, Settings, common_options, examples, parse_key, pass_settings
from memfabric.cli.memory import DIRECTORY_VARIABLE, SHARED_MEMORY
from memfabric.cli.output import NOTHING, console, count, emit_json, note, plural, table
from memfabric.errors import MemfabricError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memfabric.client import Client, PutResult

namespace_option = click.option("-n", "--namespace", required=True, metavar="NAME", help="The namespace.")

keys_option = click.option(
    "--keys",
    "keys_file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="Read more keys from this file, one a line ('-' for standard input).",
)
directory_option = click.option(
    "--directory",
    type=click.Path(file_okay=False),
    envvar=DIRECTORY_VARIABLE,
    help=f"Where nodes of this host keep shared memory.  [default: ${DIRECTORY_VARIABLE} or {SHARED_MEMORY}]",
)


# --- put ---------------------------------------------------------------------------------------------------------


@click.command(
    short_help="Store a file as blocks; print their keys.",
    epilog=examples(
        """
memfabric put -n demo kv.bin
head -c 200000 /dev/urandom | memfabric put -n demo --pad - > keys.txt
memfabric put -n demo kv.bin --tokens prompt.json
memfabric get -n demo --keys keys.txt -o copy.bin
"""
    ),
)
@namespace_option
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--pad", is_flag=True, help="Fill the last block with zeros where the file ends inside it.")
@click.option("--key", type=KEY, help="Store one block under this key.")
@click.option("--parent", type=KEY, help="Continue the chain that ends with this key.")
@click.option(
    "--tokens",
    "tokens_file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    help="Token ids of the prompt (JSON list, or numbers in text): keys are those an engine would look for.",
)
@directory_option
@common_options(json=True)
@pass_settings
def put(
    settings: Settings,
    namespace: str,
    directory: str | None,
    file: str,
    pad: bool,
    key: bytes | None,
    parent: bytes | None,
    tokens_file: str | None,
) -> None:
    """Store FILE ('-' for standard input) as a chain of blocks; print their keys, one a line.

    Without --tokens or --key, a block's key follows from the namespace's fingerprint, the key of the block before it
    and its content: the same file gets the same keys.
    """
    if key is not None and tokens_file is not None:
        raise UsageError("--key and --tokens exclude each other")
    if file == "-" and tokens_file == "-":
        raise UsageError("only one of FILE and --tokens can be standard input")
    tokens = _read_tokens(tokens_file) if tokens_file is not None else None
    from memfabric.cli.files import Upload

    with settings.client(namespace, directory) as client, click.open_file(file, "rb") as stream:
        upload = Upload(client, key=key, parent=parent, tokens=tokens, pad=pad)
        rows: list[dict[str, Any]] = []
        problems: list[str] = []
        written = 0
        for keys, result in upload.run(stream, file):
            rows += _put_rows(keys.hex(), [parent.hex() for parent in _raw(keys.parents)], result)
            written += result.bytes_written
            if not settings.as_json:
                _echo_keys(row["key"] for row in rows[-len(keys) :] if row["status"] in ("stored", "exists"))
            if not result.ok:
                problems.append(result.message)
                break
        padding = upload.padding_bytes
    if settings.as_json:
        document = {"namespace": namespace, "blocks": rows, "bytes_written": written, "padding_bytes": padding}
        emit_json(document)
    _tell_put(rows, written, padding)
    if problems:
        _fail_put(rows, problems)


def _put_rows(keys: list[str], parents: list[str], result: PutResult) -> list[dict[str, Any]]:
    from memfabric.client import PutStatus

    statuses = [PutStatus(status).name.lower() for status in result.status.tolist()]
    return [
        {"key": key, "parent": parent, "status": status}
        for key, parent, status in zip(keys, parents, statuses, strict=True)
    ]


def _tell_put(rows: list[dict[str, Any]], written: int, padding: int) -> None:
    stored = sum(row["status"] == "stored" for row in rows)
    there = sum(row["status"] == "exists" for row in rows)
    words = [f"{plural(stored, 'block')} stored ({units.format_bytes(written)})"]
    if there:
        words.append(f"{there:,} already there")
    if padding:
        words.append(f"the last block ends with {plural(padding, 'zero byte')} of padding")
    note(", ".join(words) + ".")


def _fail_put(rows: list[dict[str, Any]], problems: list[str]) -> None:
    bad = [row for row in rows if row["status"] not in ("stored", "exists")]
    kinds = ", ".join(sorted({row["status"].replace("_", " ") for row in bad}))
    why = "; ".join(problem for problem in dict.fromkeys(problems) if problem)
    raise MemfabricError(f"{plural(len(bad), 'block')} not stored: {kinds}{f' ({why})' if why else ''}")


def _read_tokens(file: str) -> list[int]:
    """Token ids from a JSON list, or from text in which they are separated by anything that is not a digit."""
    import json
    import re

    with click.open_file(file, "r", encoding="utf-8") as stream:
        text = stream.read()
    try:
        ids = json.loads(text)
    except ValueError:
        words = re.split(r"[\s,;]+", text.strip())
        ids = [int(word) if word.isdecimal() else word for word in words if word]
    if isinstance(ids, int):
        ids = [ids]
    if not isinstance(ids, list):
        raise UsageError(f"{file}: expected a list of token ids")
    for position, value in enumerate(ids):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
            raise UsageError(f"{file}: item {position + 1} is {str(value)[:40]!r}, not a token id (0 to 2**32 - 1)")
    return ids


# --- get ---------------------------------------------------------------------------------------------------------


@click.command(
    short_help="Read blocks into a file.",
    epilog=examples(
        """
memfabric get -n demo 6f1c0f2b8f0e4c6d9a7b5e3d1c2b4a69 -o block.bin
memfabric put -n demo kv.bin | memfabric get -n demo --keys - -o copy.bin
memfabric get -n demo --keys keys.txt --bytes 200000 | sha256sum
"""
    ),
)
@namespace_option
@click.argument("keys", type=KEY, nargs=-1, metavar="[KEY]...")
@keys_option
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True),
    default="-",
    help="Where to write the bytes.  [default: standard output]",
)
@click.option("--bytes", "limit_bytes", type=SIZE, help="Write only so many bytes (undoes put --pad).")
@directory_option
@common_options(json=True)
@pass_settings
def get(
    settings: Settings,
    namespace: str,
    directory: str | None,
    keys: tuple[bytes, ...],
    keys_file: str | None,
    output: str,
    limit_bytes: int | None,
) -> None:
    """Read blocks and write their bytes one after another.

    Every block is verified. If one is missing or damaged nothing of its batch is written, an existing output file stays
    as it was, and the command fails.
    """
    if settings.as_json and output == "-":
        raise UsageError("--json goes to standard output, so the bytes need a file: -o FILE")
    wanted = wanted_keys(keys, keys_file)
    if not settings.as_json and output == "-" and sys.stdout.isatty():
        raise UsageError("blocks are binary and standard output is a terminal; say -o FILE, or pipe it")
    from memfabric.cli.files import download

    with settings.client(namespace, directory) as client:
        total = len(wanted) * client.namespace.block_bytes
        if limit_bytes is not None and limit_bytes > total:
            raise UsageError(f"--bytes is {limit_bytes}, but {plural(len(wanted), 'block')} hold {total}")
        written = download(client, wanted, output, total if limit_bytes is None else limit_bytes)
    if settings.as_json:
        emit_json({"namespace": namespace, "blocks": len(wanted), "bytes_written": written, "output": output})
    else:
        note(f"{plural(len(wanted), 'block')} read, {units.format_bytes(written)} written.")


# --- ls ----------------------------------------------------------------------------------------------------------


@click.command(
    short_help="List blocks.",
    epilog=examples("memfabric ls -n demo\nmemfabric ls -n demo --limit 0 --json | jq length"),
)
@namespace_option
@click.option("--limit", type=click.IntRange(0), default=100, show_default=True, help="Most blocks to show; 0 for all.")
@common_options(json=True)
@pass_settings
def ls(settings: Settings, namespace: str, limit: int) -> None:
    """List the readable blocks of a namespace, in the order of their places."""
    rows: list[dict[str, Any]] = []
    more = False
    with settings.client(namespace) as client:
        for row in _list_rows(client):
            if limit and len(rows) == limit:
                more = True
                break
            rows.append(row)
    if settings.as_json:
        emit_json(rows)
    elif rows:
        from memfabric.cli.render import ago

        made = table("key", "parent", "node", ">region", ">block", ">tokens", ">reused", ">last use")
        for row in rows:
            made.add_row(
                row["key"],
                row["parent"] or NOTHING,
                row["node"] or NOTHING,
                str(row["region"]),
                count(row["block"]),
                count(row["tokens"]),
                count(row["reuse"]),
                ago(row["age_ns"]),
            )
        console().print(made)
    else:
        note(f"Namespace {namespace} holds no block.")
    if more:
        note(f"More blocks are there; --limit 0 shows all (now {limit:,}).")


# --- rm ----------------------------------------------------------------------------------------------------------


@click.command(
    short_help="Remove blocks.",
    epilog=examples(
        """
memfabric rm -n demo 6f1c0f2b8f0e4c6d9a7b5e3d1c2b4a69
memfabric rm -n demo --keys keys.txt
memfabric rm -n demo --all --yes
"""
    ),
)
@namespace_option
@click.argument("keys", type=KEY, nargs=-1, metavar="[KEY]...")
@keys_option
@click.option("--all", "everything", is_flag=True, help="Remove all blocks of the namespace.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before removing all.")
@common_options(json=True)
@pass_settings
def rm(
    settings: Settings,
    namespace: str,
    keys: tuple[bytes, ...],
    keys_file: str | None,
    everything: bool,
    yes: bool,
) -> None:
    """Remove blocks. A block that is being read can't be found any more, and goes when the reader has finished."""
    if everything and (keys or keys_file):
        raise UsageError("say keys or --all, not both")
    with settings.client(namespace) as client:
        if everything:
            if not yes:
                click.confirm(f"Remove all blocks of namespace {namespace}?", abort=True, err=True)
            wanted = [key for page in client.list_blocks() for key in page.keys]
        else:
            wanted = wanted_keys(keys, keys_file)
        status = client.remove(wanted).status.tolist() if wanted else []
    from memfabric.client import RemoveStatus

    names = [RemoveStatus(value).name.lower() for value in status]
    if settings.as_json:
        emit_json([{"key": key.hex(), "status": name} for key, name in zip(wanted, names, strict=True)])
    words = [f"{plural(len(names) - names.count('missing'), 'block')} removed"]
    if "busy" in names:
        words.append(f"{names.count('busy'):,} of them still being read")
    note(", ".join(words) + ".")
    if "missing" in names:
        missing = [key.hex() for key, name in zip(wanted, names, strict=True) if name == "missing"]
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        if not everything:  # with --all, others may have removed some meanwhile
            raise MemfabricError(f"{plural(len(missing), 'key')} not in namespace {namespace}: {shown}")


# --- explain -----------------------------------------------------------------------------------------------------


@click.command(
    short_help="Tell all about one block.",
    epilog=examples("memfabric explain -n demo 6f1c0f2b8f0e4c6d9a7b5e3d1c2b4a69"),
)
@namespace_option
@click.argument("key", type=KEY)
@common_options(json=True)
@pass_settings
def explain(settings: Settings, namespace: str, key: bytes) -> None:
    """Tell everything the server knows about a block: where it is, who uses it, when it will go."""
    with settings.client(namespace) as client:
        document = client.explain(key)
    if settings.as_json:
        emit_json(document)
        return
    from memfabric.cli.story import tell

    for line in tell(document):
        click.echo(line)


# --- shared ------------------------------------------------------------------------------------------------------


def wanted_keys(keys: tuple[bytes, ...], keys_file: str | None) -> list[bytes]:
    """Keys from the command line and from a file."""
    wanted = list(keys)
    if keys_file is not None:
        with click.open_file(keys_file, "r", encoding="utf-8", errors="replace") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    try:
                        wanted.append(parse_key(line))
                    except UsageError as error:
                        raise UsageError(f"{keys_file}, line {number}: {error}") from None
    if not wanted:
        raise UsageError("no key given; say KEY… or --keys FILE")
    return wanted


def _list_rows(client: Client) -> Iterator[dict[str, Any]]:
    """All readable blocks, page by page; `parent` is None at the start of a chain, as far as the pool holds it.

    A listing says regions only; `node` comes from explaining one block of each region, and is None if that has gone.
    """
    nodes: dict[int, str | None] = {}
    for page in client.list_blocks():
        columns = (page.region, page.block, page.tokens, page.reuse, page.age_ns)
        parents = (parent.hex() if any(parent) else None for parent in _raw(page.keys.parents))
        for key, parent, region, *values in zip(page.keys.hex(), parents, *(c.tolist() for c in columns), strict=True):
            if nodes.get(region) is None:
                told = client.explain(key)
                nodes[region] = told.get("node") if told.get("region") == region else None
            row = {"key": key, "parent": parent, "node": nodes[region], "region": region}
            yield row | dict(zip(("block", "tokens", "reuse", "age_ns"), values, strict=True))


def _raw(keys: Any) -> list[bytes]:
    data = keys.tobytes()
    return [data[start : start + 16] for start in range(0, len(data), 16)]


def _echo_keys(keys: Any) -> None:
    text = "\n".join(keys)
    if text:
        click.echo(text)


COMMANDS = (put, get, ls, rm, explain)
