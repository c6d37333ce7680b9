"""Hugging Face transformers: a prompt's KV cache out of the pool, and into it.

Responsible for three things: the fingerprint of a model's KV, where a block's fragments lie in the cache's
tensors, and which blocks of a prompt to read and to store. One sequence at a time (batch 1), full attention,
host memory.

A block is the KV of ``block_tokens`` tokens, its bytes in the order `LAYOUT`: layer, K then V, head, token, dim. A
segment is one layer. A fragment is one head's part of it, ``block_tokens × head_dim`` elements, contiguous in the
cache too; so blocks go between the pool and the tensors that attention uses with no copy in between.

torch and transformers are imported when first needed; without them every function raises `UsageError` and says
what to install.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memfabric.core.fingerprint import Fingerprint
from memfabric.core.messages import NamespaceSpec
from memfabric.errors import UsageError

if TYPE_CHECKING:
    from memfabric.client import Client, PagedLayout, PutResult

LAYOUT = "LKHTD"
"""Layer, K/V, head, token, dim: name of this connector's order of a block's bytes."""

_READ_BYTES = 1 << 20


def weights_revision(model_dir: Path) -> str:
    """A content hash of a model directory's weights: ``sha256:…`` over its safetensors files in order of name.

    It reads every byte: about a second per GiB. Keep the answer if you need it often.

    Raises:
        UsageError: no ``*.safetensors`` there.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise UsageError(f"no *.safetensors in {model_dir}; pass a revision of your own instead")
    state = hashlib.sha256()
    for file in files:
        state.update(f"{file.name}:{file.stat().st_size};".encode())
        with file.open("rb") as stream:
            while data := stream.read(_READ_BYTES):
                state.update(data)
    return f"sha256:{state.hexdigest()}"


def fingerprint(
    config: Any, *, model: str, revision: str, block_tokens: int = 16, dtype: str | None = None, salt: str = ""
) -> Fingerprint:
    """What makes this model's KV blocks interchangeable.

    Args:
        config: the model's transformers config.
        model: model id, e.g. ``HuggingFaceTB/SmolLM2-135M-Instruct``.
        revision: of the weights; see `weights_revision`. Other weights give other KV.
        block_tokens: tokens in a block, at least 1.
        dtype: of the cache, e.g. ``float32``; None: the config's.
        salt: anything else that must agree, e.g. an adapter.

    Raises:
        UsageError: not every layer has plain full attention (sliding windows, state-space layers), so a block of tokens
            is not all that the layers remember; or no dtype is known.
    """
    text = config.get_text_config(decoder=True)
    _check_full_attention(text)
    name = str(dtype or getattr(text, "dtype", None) or "").removeprefix("torch.")
    if not name:
        raise UsageError("the config names no dtype; pass the dtype of the KV cache")
    if block_tokens < 1:
        raise UsageError(f"block_tokens must be at least 1, got {block_tokens}")
    heads = int(text.num_attention_heads)
    return Fingerprint(
        model=model,
        revision=revision,
        dtype=name,
        layout=LAYOUT,
        layers=int(text.num_hidden_layers),
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        block_tokens=block_tokens,
        salt=salt,
    )


def namespace_spec(name: str, of: Fingerprint) -> NamespaceSpec:
    """The namespace for a model's blocks, to pass as ``memfabric.connect(…, create=…)``: a segment is one layer.

    Raises:
        UsageError: the size of the fingerprint's dtype is not known.
    """
    try:
        block_bytes = of.kv_block_bytes()
    except ValueError as error:
        raise UsageError(str(error)) from error
    return NamespaceSpec(
        name=name, block_bytes=block_bytes, block_tokens=of.block_tokens, segments=of.layers, fingerprint=of
    )


def allocate_cache(of: Fingerprint, capacity_tokens: int) -> Any:
    """An empty `transformers.Cache` with room for `capacity_tokens`; see `kv_cache.allocate`.

    Raises:
        UsageError: `capacity_tokens` is not positive, torch has no such dtype, or torch is not there.
    """
    if capacity_tokens < 1:
        raise UsageError(f"capacity_tokens must be at least 1, got {capacity_tokens}")
    torch = _torch()
    dtype = getattr(torch, of.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"torch has no dtype {of.dtype!r}")
    from memfabric.engines import kv_cache

    return kv_cache.allocate(of.layers, of.kv_heads, of.head_dim, capacity_tokens, dtype)


def paged_layout(cache: Any, of: Fingerprint) -> PagedLayout:
    """Where block ``b`` (tokens ``[b × block_tokens, (b + 1) × block_tokens)``) lies in a cache's tensors.

    For a cache from `allocate_cache` it covers the whole room; for another (`DynamicCache` after prefill) the
    tokens that are in it. The layout keeps the tensors alive; it goes stale when the cache replaces them.

    Raises:
        UsageError: the cache's tensors are not what the fingerprint says, or not contiguous per head.
    """
    from memfabric.client import PagedLayout

    _check_layout_name(of)
    if len(cache.layers) != of.layers:
        raise UsageError(f"the cache has {len(cache.layers)} layers, the fingerprint {of.layers}")
    segments: list[list[tuple[Any, int, int, int]]] = []
    for index, layer in enumerate(cache.layers):
        fragments: list[tuple[Any, int, int, int]] = []
        for kind in ("keys", "values"):
            tensor = _tensor_of(layer, kind)
            _check_tensor(tensor, f"{kind} of layer {index}", of)
            size = of.block_tokens * of.head_dim * tensor.element_size()
            # one tensor per head, so that no block id can lead from one head's tokens into the next head's
            fragments += [(tensor[0, head], 0, size, size) for head in range(of.kv_heads)]
        segments.append(fragments)
    return PagedLayout.from_tensors(segments)


class LoadedPrefix(NamedTuple):
    """What `load_prefix` found.

    Attributes:
        cache: with the prefix in it; pass it as ``past_key_values``.
        token_count: tokens in it; the model still has to see ``token_ids[token_count:]``, at least one.
        block_count, bytes_read: what came from the pool.
    """

    cache: Any
    token_count: int
    block_count: int
    bytes_read: int


def load_prefix(client: Client, token_ids: Sequence[int], *, capacity_tokens: int | None = None) -> LoadedPrefix:
    """Read the longest stored prefix of a prompt from the pool into a fresh cache.

    At least one token is left to compute, since the first new token needs its logits. Blocks that are missing,
    unreachable or damaged end the prefix: what is returned was verified.

    Args:
        client: of a namespace made with `namespace_spec` and attached with the model's fingerprint.
        token_ids: the prompt.
        capacity_tokens: room of the cache, for the prompt and what will be generated; None: the prompt's length.

    Raises:
        UsageError: empty prompt, capacity below it, or a namespace of another layout. Other errors of `Client.get`.
        In all cases the pool is unchanged.
    """
    of = client.namespace.fingerprint
    _check_layout_name(of)
    length = len(token_ids)
    capacity = length if capacity_tokens is None else capacity_tokens
    if length < 1:
        raise UsageError("token_ids is empty; a prompt has at least one token")
    if capacity < length:
        raise UsageError(f"capacity_tokens {capacity} is less than the prompt's {length} tokens")
    cache = allocate_cache(of, capacity)
    keys = client.block_keys(token_ids)[: (length - 1) // of.block_tokens]
    matched = client.match(keys)
    if not matched:
        return LoadedPrefix(cache, 0, 0, 0)
    from memfabric.client import PagedBlocks

    result = client.get(keys[:matched], out=PagedBlocks(paged_layout(cache, of), range(matched)))
    blocks = result.prefix_count
    for layer in cache.layers:
        layer.fill(blocks * of.block_tokens)
    return LoadedPrefix(cache, blocks * of.block_tokens, blocks, blocks * client.namespace.block_bytes)


def store_prefix(client: Client, token_ids: Sequence[int], cache: Any) -> PutResult:
    """Put the whole blocks of a sequence into the pool, straight from the cache's tensors.

    Blocks that are there already are not written again. A tail shorter than a block is not stored.

    Args:
        client: see `load_prefix`.
        token_ids: the tokens whose KV is in `cache`, from the start; the cache may hold more.
        cache: a `transformers.Cache` after a forward pass over them.

    Raises:
        UsageError: the cache holds fewer tokens, or is not what the namespace's fingerprint says. Other errors of
        `Client.put`.
    """
    of = client.namespace.fingerprint
    _check_layout_name(of)
    held = cache.get_seq_length()
    if held < len(token_ids):
        raise UsageError(f"the cache holds {held} tokens, fewer than the {len(token_ids)} token_ids")
    keys = client.block_keys(token_ids)
    if not len(keys):
        return client.put(keys, [])
    from memfabric.client import PagedBlocks

    return client.put(keys, PagedBlocks(paged_layout(cache, of), range(len(keys))))


@dataclass(frozen=True)
class Generation:
    """What `PooledModel.generate` did.

    Attributes:
        token_ids: new tokens, the end-of-sequence token included when it came.
        prompt_tokens: length of the prompt; `reused_tokens` of them came from the pool, as `reused_blocks` blocks.
        bytes_read: from the pool.
        load_s: seconds spent to find and read the prefix.
        first_token_s: seconds from the tokenized prompt to the first new token; `load_s` is part of it.
        stored: what storing the prompt did, after the first token; None if nothing was to be stored.
        store_s: seconds that storing took.
    """

    token_ids: list[int]
    prompt_tokens: int
    reused_tokens: int
    reused_blocks: int
    bytes_read: int
    load_s: float
    first_token_s: float
    stored: PutResult | None
    store_s: float


class PooledModel:
    """A causal language model that keeps its prompts' KV in a pool. Greedy, one sequence at a time.

    Not thread-safe. Without a client it computes everything: the same path, for comparison.
    """

    def __init__(self, model: Any, client: Client | None, of: Fingerprint) -> None:
        """Bind a model and a client.

        Args:
            model: a transformers model for causal language modelling, in evaluation mode, in host memory.
            client: of the namespace for the model's blocks, or None.
            of: the model's fingerprint (`fingerprint`).

        Raises:
            UsageError: the client's namespace is for another fingerprint.
        """
        if client is not None and client.namespace.fingerprint != of:
            differences = "; ".join(of.differences(client.namespace.fingerprint))
            raise UsageError(f"namespace {client.namespace.name!r} holds other KV: {differences}")
        self.model = model
        self.client = client
        self.fingerprint = of

    def generate(self, token_ids: Sequence[int], new_tokens: int, *, store: bool = True) -> Generation:
        """Continue a prompt greedily, reusing what the pool has of it.

        Args:
            token_ids: the prompt, at least one token.
            new_tokens: at most so many, at least 1; generation ends early at an end-of-sequence token.
            store: put the prompt's blocks into the pool once the first token is there.

        Raises:
            Errors of the client; nothing was generated then. A caller that would rather compute than fail
            catches `MemfabricError` and generates without a client.
        """
        torch = _torch()
        if new_tokens < 1:
            raise UsageError(f"new_tokens must be at least 1, got {new_tokens}")
        start_s = time.perf_counter()
        prefix = self._prefix(token_ids, len(token_ids) + new_tokens)
        load_s = time.perf_counter() - start_s
        with torch.inference_mode():
            token = self._step(token_ids[prefix.token_count :], prefix.cache)
            first_token_s = time.perf_counter() - start_s
            stored, store_s = None, 0.0
            if store and self.client is not None:
                store_start_s = time.perf_counter()
                stored = store_prefix(self.client, token_ids, prefix.cache)
                store_s = time.perf_counter() - store_start_s
            tokens = [token]
            ends = self._end_tokens()
            while len(tokens) < new_tokens and tokens[-1] not in ends:
                tokens.append(self._step(tokens[-1:], prefix.cache))
        return Generation(
            token_ids=tokens,
            prompt_tokens=len(token_ids),
            reused_tokens=prefix.token_count,
            reused_blocks=prefix.block_count,
            bytes_read=prefix.bytes_read,
            load_s=load_s,
            first_token_s=first_token_s,
            stored=stored,
            store_s=store_s,
        )

    def _prefix(self, token_ids: Sequence[int], capacity_tokens: int) -> LoadedPrefix:
        if self.client is not None:
            return load_prefix(self.client, token_ids, capacity_tokens=capacity_tokens)
        if not len(token_ids):
            raise UsageError("token_ids is empty; a prompt has at least one token")
        return LoadedPrefix(allocate_cache(self.fingerprint, capacity_tokens), 0, 0, 0)

    def _step(self, token_ids: Sequence[int], cache: Any) -> int:
        """Run the model over tokens behind the cache; the most likely next token."""
        torch = _torch()
        ids = torch.tensor([list(token_ids)])
        logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    def _end_tokens(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            return set()
        return set(ends) if isinstance(ends, (list, tuple)) else {int(ends)}


def _torch() -> Any:
    """The torch module; transformers must be there too.

    Raises:
        UsageError: one of them is missing; says what to install.
    """
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"this needs torch and transformers ({error.name or error} is missing); install them with: "
            "pip install 'memfabric[demo]'"
        ) from error
    return torch


def _check_full_attention(text_config: Any) -> None:
    kinds = getattr(text_config, "layer_types", None)
    if kinds is None:
        windows = ("sliding_window", "attention_chunk_size")
        kinds = [name for name in windows if getattr(text_config, name, None) is not None]
    other = sorted({str(kind) for kind in kinds} - {"full_attention"})
    if other:
        found = ", ".join(other)
        raise UsageError(f"only models with full attention in every layer are supported; this one has {found}")


def _check_layout_name(of: Fingerprint) -> None:
    if of.layout != LAYOUT:
        raise UsageError(f"the namespace's blocks have the layout {of.layout!r}; this connector reads {LAYOUT!r}")


def _tensor_of(layer: Any, kind: str) -> Any:
    """The room of a preallocated layer while it uses it, else the layer's tensor."""
    return getattr(layer, f"{kind}_room" if getattr(layer, "in_room", False) else kind)


def _check_tensor(tensor: Any, what: str, of: Fingerprint) -> None:
    if tensor is None:
        raise UsageError(f"{what} is empty: run the model first, or use allocate_cache")
    shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if shape[:2] + shape[3:] != [1, of.kv_heads, of.head_dim] or dtype != of.dtype:
        wanted = f"{of.dtype} [1, {of.kv_heads}, tokens, {of.head_dim}]"
        raise UsageError(f"{what} is {dtype} {shape}, the namespace holds {wanted}")
    if not tensor[0, 0].is_contiguous():
        raise UsageError(f"{what} is not contiguous per head (strides {tensor.stride()}); pass a contiguous copy")
