"""What makes two engines' KV blocks interchangeable, and the words for when they are not.

Pure. Two engines whose fingerprints differ can never read each other's blocks: the digest of the
fingerprint is the root of every block key, and attach refuses with the names of the fields that differ.
"""

from __future__ import annotations

import hashlib

import msgspec

_DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """The identity of a namespace's KV layout.

    Attributes:
        model: model id, e.g. ``HuggingFaceTB/SmolLM2-135M-Instruct``.
        revision: the weights' revision or content hash; other weights give other KV.
        dtype: element type of the KV cache (``float32``, ``bfloat16``, …).
        layout: name of the order of a block's bytes, e.g. ``LKHTD`` (layer, K/V, head, token, dim).
        layers, kv_heads, head_dim: of this shard.
        block_tokens: tokens in one block.
        tp_size, tp_rank, pp_size, pp_rank: the shard's place in the model's parallel plan.
        salt: anything else that must agree (quantisation scheme, LoRA adapter, tenant salt).
    """

    model: str = ""
    revision: str = ""
    dtype: str = ""
    layout: str = ""
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    block_tokens: int = 0
    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    salt: str = ""

    def digest(self) -> bytes:
        """16 bytes over all fields in declaration order; equal if and only if the fingerprints are."""
        state = hashlib.blake2b(digest_size=16, person=b"memfabric-fp-1")
        for name in self.__struct_fields__:
            text = f"{name}={getattr(self, name)!r};"
            state.update(text.encode())
        return state.digest()

    def kv_block_bytes(self) -> int:
        """Bytes of one block: ``layers × 2 × kv_heads × head_dim × block_tokens × itemsize`` (K and V).

        Raises:
            ValueError: the dtype's size is not known.
        """
        try:
            itemsize = _DTYPE_BYTES[self.dtype]
        except KeyError:
            known = ", ".join(sorted(_DTYPE_BYTES))
            raise ValueError(f"size of dtype {self.dtype!r} is not known; known: {known}") from None
        return self.layers * 2 * self.kv_heads * self.head_dim * self.block_tokens * itemsize

    def differences(self, other: Fingerprint) -> list[str]:
        """One line per field that differs: ``dtype: 'bfloat16' asked, 'float32' stored``."""
        return [
            f"{name}: {getattr(self, name)!r} asked, {getattr(other, name)!r} stored"
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(other, name)
        ]
