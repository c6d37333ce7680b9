"""``memfabric namespace``: create, list, show, delete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from memfabric import units
from memfabric.cli.base import DURATION, SIZE, Settings, common_options, examples, pass_settings
from memfabric.cli.output import console, count, emit_json, note, percent, plural, table
from memfabric.errors import UsageError

if TYPE_CHECKING:
    from memfabric.core.fingerprint import Fingerprint
    from memfabric.core.messages import NamespaceInfo, NamespaceSpec

DEFAULT_BLOCK_TOKENS = 16
_DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"]


@click.group()
@common_options()
def namespace() -> None:
    """Create, list, show and delete namespaces.

    A namespace isolates blocks: it fixes their size and the model they belong to, and may have a quota.
    """


@namespace.command(
    epilog=examples(
        """
memfabric namespace create demo --block-size 64KiB
memfabric namespace create chat --model Qwen/Qwen3-8B --dtype bfloat16 \\
    --layers 36 --kv-heads 8 --head-dim 128 --block-tokens 16
memfabric namespace create scratch --block-size 1MiB --quota 10GiB --policy ttl --ttl 1h
"""
    )
)
@click.argument("name")
@click.option("--block-size", "--block-bytes", "block_bytes", type=SIZE, help="Payload of one block.")
@click.option(
    "--block-tokens",
    type=click.IntRange(1, 1 << 20),
    default=DEFAULT_BLOCK_TOKENS,
    show_default=True,
    help="Tokens in one block.",
)
@click.option(
    "--segments",
    type=click.IntRange(1, 4096),
    help="Parts of a block that can be read alone.  [default: one a layer, or 1]",
)
@click.option("--quota", "quota_bytes", type=SIZE, default=0, help="Most that it may hold.  [default: no limit]")
@click.option(
    "--policy",
    type=click.Choice(["lru", "window-lru", "ttl"]),
    default="lru",
    show_default=True,
    help="What is evicted first.",
)
@click.option(
    "--ttl", "ttl_ns", type=DURATION, default=0, help="Drop blocks that were not used for so long.  [default: never]"
)
@click.option("--model", default="", help="Model id; engines of another one are refused.")
@click.option("--revision", default="", help="Revision or hash of the weights.")
@click.option("--dtype", type=click.Choice(_DTYPES), help="Element type of the KV cache.")
@click.option("--layout", default="", help="Name of the order of a block's bytes, for example LKHTD.")
@click.option("--layers", type=click.IntRange(1), help="Layers of the model.")
@click.option("--kv-heads", type=click.IntRange(1), help="KV heads of a layer.")
@click.option("--head-dim", type=click.IntRange(1), help="Elements of a head.")
@common_options(json=True)
@pass_settings
def create(settings: Settings, name: str, **options: Any) -> None:
    """Create a namespace.

    Say --block-size, or what it follows from: --dtype, --layers, --kv-heads and --head-dim. Creating the same one again
    changes nothing; another one under the same name is refused.
    """
    spec, derived = specify(name, options)
    with settings.admin() as admin:
        info = admin.namespace_create(spec)
    if settings.as_json:
        emit_json(info_document(info))
        return
    if derived:
        note(f"Block size {units.format_bytes(spec.block_bytes)} = {derived}")
    capacity = f"room for {plural(info.capacity_blocks, 'block')}" if info.capacity_blocks else "no region yet"
    shape = f"blocks of {units.format_bytes(spec.block_bytes)}, {spec.block_tokens} tokens each"
    click.echo(f"Namespace {name}: {shape}, {capacity}.")


def specify(name: str, options: dict[str, Any]) -> tuple[NamespaceSpec, str]:
    """A specification from the options of `create`, and how its block size was derived ("" where it was given).

    Raises:
        UsageError: no block size and not all of what it follows from, or the two contradict each other.
    """
    from memfabric.core.messages import NamespaceSpec

    shape = {option: options[option] for option in ("dtype", "layers", "kv_heads", "head_dim")}
    given = options["block_bytes"]
    missing = [f"--{option.replace('_', '-')}" for option, value in shape.items() if value is None]
    about_model = any(options[option] for option in ("model", "revision", "layout", *shape))
    fingerprint = _fingerprint(options) if about_model else None
    derived = ""
    if not missing and fingerprint is not None:
        factors = ("{layers} layers", "2 (K, V)", "{kv_heads} heads", "{head_dim}", "{block_tokens} tokens", "{dtype}")
        derived = " x ".join(factors).format(**options)
        computed = fingerprint.kv_block_bytes()
        if given is not None and given != computed:
            raise UsageError(f"--block-size is {given} bytes, but {derived} is {computed}; leave --block-size out")
        given = computed
    if given is None:
        if len(missing) < len(shape):
            raise UsageError(f"the block size follows from the model only with {', '.join(missing)} as well")
        raise UsageError("say --block-size, or --dtype, --layers, --kv-heads and --head-dim")
    spec = NamespaceSpec(
        name=name,
        block_bytes=given,
        block_tokens=options["block_tokens"],
        segments=options["segments"] or (options["layers"] if derived else 1),
        quota_bytes=options["quota_bytes"],
        policy=options["policy"],
        ttl_ns=options["ttl_ns"],
    )
    if fingerprint is not None:
        import msgspec

        spec = msgspec.structs.replace(spec, fingerprint=fingerprint)
    return spec, derived


def _fingerprint(options: dict[str, Any]) -> Fingerprint:
    from memfabric.core.fingerprint import Fingerprint

    return Fingerprint(
        model=options["model"],
        revision=options["revision"],
        dtype=options["dtype"] or "",
        layout=options["layout"],
        layers=options["layers"] or 0,
        kv_heads=options["kv_heads"] or 0,
        head_dim=options["head_dim"] or 0,
        block_tokens=options["block_tokens"],
    )


@namespace.command("list", epilog=examples("memfabric namespace list\nmemfabric namespace list --json"))
@common_options(json=True)
@pass_settings
def list_namespaces(settings: Settings) -> None:
    """List all namespaces."""
    with settings.admin() as admin:
        infos = admin.namespaces()
    if settings.as_json:
        emit_json([info_document(info) for info in infos])
        return
    if not infos:
        note("No namespace yet; create one with `memfabric namespace create`.")
        return
    made = table("namespace", ">block", ">tokens", ">blocks", ">capacity", ">regions", "policy", "model")
    for info in infos:
        spec = info.spec
        made.add_row(
            spec.name,
            units.format_bytes(spec.block_bytes),
            count(spec.block_tokens),
            count(info.blocks),
            count(info.capacity_blocks),
            count(info.regions),
            spec.policy,
            spec.fingerprint.model,
        )
    console().print(made)


@namespace.command(epilog=examples("memfabric namespace show demo\nmemfabric namespace show demo --json"))
@click.argument("name")
@common_options(json=True)
@pass_settings
def show(settings: Settings, name: str) -> None:
    """Show everything about one namespace."""
    with settings.admin() as admin:
        info = admin.namespace_show(name)
    if settings.as_json:
        emit_json(info_document(info))
        return
    from rich.table import Table

    sheet = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    sheet.add_column(style="dim", no_wrap=True)
    sheet.add_column(overflow="fold")
    for label, value in _facts(info):
        sheet.add_row(label, value)
    console().print(sheet)


def _facts(info: NamespaceInfo) -> list[tuple[str, str]]:
    from memfabric.cli.render import hit_ratios

    spec = info.spec
    match, read = hit_ratios(info.counters)
    size = units.format_bytes(spec.block_bytes)
    facts = [
        ("namespace", spec.name),
        (
            "block",
            f"{size}, {spec.block_tokens} tokens, {plural(spec.segments, 'segment')}",
        ),
        ("blocks", f"{info.blocks:,} readable, {info.writing:,} being written, {info.quarantined:,} in quarantine"),
        ("capacity", f"{plural(info.capacity_blocks, 'block')} in {plural(info.regions, 'region')}"),
        ("quota", units.format_bytes(spec.quota_bytes) if spec.quota_bytes else "none"),
        ("policy", spec.policy + (f", window {percent(spec.window_ratio)}" if spec.policy == "window-lru" else "")),
        ("ttl", units.format_duration(spec.ttl_ns) if spec.ttl_ns else "none"),
        ("watermarks", f"{percent(spec.low_ratio)} to {percent(spec.high_ratio)}"),
        ("hits", f"{percent(match)} of matched blocks, {percent(read)} of read blocks"),
    ]
    print_of = spec.fingerprint
    fields = [(name, getattr(print_of, name)) for name in print_of.__struct_fields__]
    known = [f"{name}={value}" for name, value in fields if value not in ("", 0)]
    facts.append(("fingerprint", f"{print_of.digest().hex()}  {' '.join(known)}"))
    facts += [(name.replace("_", " "), f"{value:,}") for name, value in sorted(info.counters.items()) if value]
    return facts


@namespace.command(epilog=examples("memfabric namespace delete demo\nmemfabric namespace delete demo --force --yes"))
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Even if it holds blocks or clients use it.")
@common_options(json=True)
@pass_settings
def delete(settings: Settings, name: str, yes: bool, force: bool) -> None:
    """Delete a namespace and its blocks.

    A namespace that holds blocks or has clients is deleted only with --force; its clients then get errors.
    """
    with settings.admin() as admin:
        info = admin.namespace_show(name)
        if not yes:
            click.confirm(f"Delete namespace {name} with {plural(info.blocks, 'block')}?", abort=True, err=True)
        admin.namespace_delete(name, force=force)
    if settings.as_json:
        emit_json({"name": name, "deleted": True, "blocks": info.blocks})
    else:
        click.echo(f"Namespace {name} is deleted ({plural(info.blocks, 'block')}).")


def info_document(info: NamespaceInfo) -> dict[str, Any]:
    """A namespace as JSON: its specification, then how it is doing."""
    import msgspec

    document: dict[str, Any] = {"name": info.spec.name, "id": info.id}
    for field in info.spec.__struct_fields__:
        if field != "name":
            value = getattr(info.spec, field)
            document[field] = msgspec.structs.asdict(value) if field == "fingerprint" else value
    document["fingerprint_digest"] = info.spec.fingerprint.digest().hex()
    for field in ("blocks", "writing", "quarantined", "capacity_blocks", "regions"):
        document[field] = getattr(info, field)
    return {**document, "counters": dict(sorted(info.counters.items()))}
