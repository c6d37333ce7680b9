"""What the demonstration and its worker processes say to each other: one JSON object a line.

A job goes to a worker as its argument; events come back on its standard output. No tensor and no block is ever
in them: KV goes through the pool or not at all.
"""

from __future__ import annotations

import msgspec


class Convert(msgspec.Struct, frozen=True, kw_only=True, tag="convert"):
    """Get the model ready in a cache directory."""

    cache: str


class Serve(msgspec.Struct, frozen=True, kw_only=True, tag="serve"):
    """Run prompts through the model.

    Attributes:
        model_dir: the converted model.
        prompts: names of texts, in order.
        new_tokens: to generate per prompt, at most. `repeats`: how often to measure the time to first token.
        block_tokens: tokens of a block.
        address, namespace: of the pool; an empty address means without a pool.
        shm_directory: where the pool's nodes keep their memory; empty for the default.
        transport: as for `memfabric.connect`.
    """

    model_dir: str
    prompts: list[str]
    new_tokens: int
    repeats: int
    block_tokens: int
    address: str = ""
    namespace: str = ""
    shm_directory: str = ""
    transport: str = "auto"


Job = Convert | Serve


class Status(msgspec.Struct, frozen=True, tag="status"):
    """What the worker is doing now, for people."""

    text: str


class Converted(msgspec.Struct, frozen=True, tag="converted"):
    """The model is ready."""

    model_dir: str


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """The worker is ready to serve.

    Attributes:
        revision, dtype, attention: of the model. `block_bytes`: of a block of its KV.
        versions: of the engine.
    """

    revision: str
    dtype: str
    attention: str
    block_bytes: int
    versions: dict[str, str]


class Served(msgspec.Struct, frozen=True, kw_only=True, tag="served"):
    """One prompt is done.

    Attributes:
        name: of the prompt. `prompt_tokens`: its length, of which `reused_tokens` were not computed.
        blocks_read, bytes_read: from the pool. `blocks_written`, `bytes_written`: into it.
        first_token_s, load_s: of each repeat. `store_s`: to write the blocks.
        tokens: new ones. `text`: decoded.
        problem: why blocks could not be stored; empty otherwise.
        transport: how blocks travelled, as the client tells; empty without a pool.
    """

    name: str
    prompt_tokens: int
    reused_tokens: int
    blocks_read: int
    bytes_read: int
    blocks_written: int
    bytes_written: int
    first_token_s: list[float]
    load_s: list[float]
    store_s: float
    tokens: list[int]
    text: str
    problem: str
    transport: str = ""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The worker gives up; it ends with a non-zero exit code next."""

    message: str


Event = Status | Converted | Loaded | Served | Failed
