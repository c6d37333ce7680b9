"""A transformers KV cache whose memory is laid out before the model runs.

Responsible for where keys and values lie; it knows neither the pool nor blocks. `DynamicCache` concatenates on
every step, so its tensors move; here each layer writes behind what is there, into memory that was allocated
once. So bytes that are read from the pool land where the attention will read them, and no step copies the prefix.

Imports torch and transformers: import it only where those are there (`engines.transformers` does).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values in memory with room for tokens to come.

    `keys` and `values` are views ``[batch, kv_heads, tokens, head_dim]`` of the room's first tokens, as everywhere in
    transformers. When the room is used up, or beam search has replaced the views, the layer goes on as a plain
    `DynamicLayer`: it concatenates.
    """

    def __init__(self, keys_room: torch.Tensor, values_room: torch.Tensor) -> None:
        """Take over two tensors ``[batch, kv_heads, capacity, head_dim]`` of one shape; their content is ignored."""
        super().__init__()
        self.dtype, self.device = keys_room.dtype, keys_room.device
        self.keys_room, self.values_room = keys_room, values_room
        self.is_initialized = True
        self.fill(0)

    def fill(self, token_count: int) -> None:
        """Declare that the room's first `token_count` tokens are valid, and nothing behind them is."""
        self.keys = self.keys_room[:, :, :token_count]
        self.values = self.values_room[:, :, :token_count]
        self._filled = (self.keys, self.values)

    @property
    def in_room(self) -> bool:
        """Whether `keys` and `values` still are the views of the room that `fill` made."""
        return self.keys is self._filled[0] and self.values is self._filled[1]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens in place; returns all keys and values."""
        if not self.in_room:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self.keys_room.shape[-2] or key_states.shape[0] != self.keys_room.shape[0]:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        self.keys_room[:, :, start:end] = key_states
        self.values_room[:, :, start:end] = value_states
        self.fill(end)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; the number is negative, as in `DynamicLayer`."""
        in_room = self.in_room
        super().crop(tokens_to_remove)
        if in_room:
            self.fill(self.keys.shape[-2])


def allocate(
    layers: int, kv_heads: int, head_dim: int, capacity_tokens: int, dtype: torch.dtype, device: str = "cpu"
) -> Cache:
    """An empty cache for one sequence, with room for `capacity_tokens`.

    One allocation, ``[layers, 2, 1, kv_heads, capacity_tokens, head_dim]``, not initialised.
    """
    room = torch.empty((layers, 2, 1, kv_heads, capacity_tokens, head_dim), dtype=dtype, device=device)
    return Cache(layers=[PreallocatedLayer(room[layer, 0], room[layer, 1]) for layer in range(layers)])
