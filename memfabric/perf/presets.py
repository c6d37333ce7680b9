"""How many bytes of keys and values a token takes in common models, and so how large a block is.

With grouped-query attention (of which multi-head and multi-query are the ends) every layer keeps a key and a value for
each of its KV heads::

    bytes per token = 2 x layers x kv_heads x head_dim x bytes of the type

With multi-head latent attention (MLA) every layer keeps one compressed latent and one rotary key for all heads::

    bytes per token = layers x (kv_lora_rank + qk_rope_head_dim) x bytes of the type

Source: the models' published ``config.json``, fields ``num_hidden_layers``, ``num_key_value_heads``, ``head_dim``
(where it is missing: ``hidden_size / num_attention_heads``), ``kv_lora_rank``, ``qk_rope_head_dim``; MLA: DeepSeek-V2,
arXiv:2405.04434, section 2.1.

Tensor parallelism deals the KV heads out to the ranks; with more ranks than heads each head is on several ranks, so a
rank never has less than one. The latent of MLA has no heads, so every rank has all of it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from memfabric.errors import UsageError

DTYPE_BYTES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4}
MOST_BLOCK_TOKENS = 4096


@dataclass(frozen=True)
class Model:
    """What of a model's shape decides the size of its KV.

    Attributes:
        name: as it is asked for. repository: whose ``config.json`` it is from.
        layers: ``num_hidden_layers``.
        kv_heads, head_dim: of each layer; 0 with MLA.
        kv_lora_rank, qk_rope_head_dim: MLA only; else 0.
        note: what makes an engine keep less than the formula says.
    """

    name: str
    repository: str
    layers: int
    kv_heads: int = 0
    head_dim: int = 0
    kv_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    note: str = ""

    @property
    def latent(self) -> bool:
        """Multi-head latent attention."""
        return self.kv_lora_rank > 0

    @property
    def formula(self) -> str:
        """With this model's numbers; ``type`` stands for the bytes of the type."""
        if self.latent:
            return f"{self.layers} x ({self.kv_lora_rank} + {self.qk_rope_head_dim}) x type"
        return f"2 x {self.layers} x {self.kv_heads} x {self.head_dim} x type"

    def token_bytes(self, *, tp: int = 1, dtype: str = "bf16") -> int:
        """Bytes of one token's KV on one rank.

        Args:
            tp: tensor-parallel ranks.
            dtype: one of `DTYPE_BYTES`.

        Raises:
            UsageError: an unknown type, or heads that can't be dealt out to so many ranks.
        """
        if dtype not in DTYPE_BYTES:
            raise UsageError(f"unknown type {dtype!r} of KV; known: {', '.join(DTYPE_BYTES)}")
        if tp < 1:
            raise UsageError(f"tensor parallelism needs at least one rank, not {tp}")
        if self.latent:
            return self.layers * (self.kv_lora_rank + self.qk_rope_head_dim) * DTYPE_BYTES[dtype]
        if self.kv_heads % tp and tp % self.kv_heads:
            raise UsageError(
                f"{self.name} has {self.kv_heads} KV heads, which {tp} ranks can neither share out nor repeat evenly"
            )
        return 2 * self.layers * max(1, self.kv_heads // tp) * self.head_dim * DTYPE_BYTES[dtype]

    def block_bytes(self, block_tokens: int, *, tp: int = 1, dtype: str = "bf16") -> int:
        """Bytes of one block on one rank.

        Raises:
            UsageError: as `token_bytes`, or an impossible number of tokens.
        """
        if not 1 <= block_tokens <= MOST_BLOCK_TOKENS:
            raise UsageError(f"a block has 1 to {MOST_BLOCK_TOKENS} tokens, not {block_tokens}")
        return block_tokens * self.token_bytes(tp=tp, dtype=dtype)


_WINDOW = "some layers look back over a window only; an engine that uses that keeps less of long prompts"

MODELS = (
    Model("llama-3-8b", "meta-llama/Meta-Llama-3-8B", 32, 8, 128),
    Model("llama-3-70b", "meta-llama/Meta-Llama-3-70B", 80, 8, 128),
    Model("llama-3.1-405b", "meta-llama/Llama-3.1-405B", 126, 8, 128),
    Model("llama-3.2-1b", "meta-llama/Llama-3.2-1B", 16, 8, 64),
    Model("llama-3.2-3b", "meta-llama/Llama-3.2-3B", 28, 8, 128),
    Model("qwen2.5-7b", "Qwen/Qwen2.5-7B", 28, 4, 128),
    Model("qwen2.5-72b", "Qwen/Qwen2.5-72B", 80, 8, 128),
    Model("qwen3-8b", "Qwen/Qwen3-8B", 36, 8, 128),
    Model("qwen3-14b", "Qwen/Qwen3-14B", 40, 8, 128),
    Model("qwen3-32b", "Qwen/Qwen3-32B", 64, 8, 128),
    Model("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", 48, 4, 128),
    Model("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B", 94, 4, 128),
    Model("mistral-7b", "mistralai/Mistral-7B-v0.3", 32, 8, 128),
    Model("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", 32, 8, 128),
    Model("mistral-small-24b", "mistralai/Mistral-Small-24B-Base-2501", 40, 8, 128),
    Model("gemma-2-9b", "google/gemma-2-9b", 42, 8, 256, note=_WINDOW),
    Model("gemma-2-27b", "google/gemma-2-27b", 46, 16, 128, note=_WINDOW),
    Model("gemma-3-27b", "google/gemma-3-27b-pt", 62, 16, 128, note=_WINDOW),
    Model("gpt-oss-20b", "openai/gpt-oss-20b", 24, 8, 64, note=_WINDOW),
    Model("gpt-oss-120b", "openai/gpt-oss-120b", 36, 8, 64, note=_WINDOW),
    Model("phi-4", "microsoft/phi-4", 40, 10, 128),
    Model("deepseek-v2-lite", "deepseek-ai/DeepSeek-V2-Lite", 27, kv_lora_rank=512, qk_rope_head_dim=64),
    Model("deepseek-v3", "deepseek-ai/DeepSeek-V3", 61, kv_lora_rank=512, qk_rope_head_dim=64),
    Model("kimi-k2", "moonshotai/Kimi-K2-Base", 61, kv_lora_rank=512, qk_rope_head_dim=64),
    Model("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", 30, 3, 64),
)
_BY_NAME = {model.name: model for model in MODELS}


def find(name: str) -> Model:
    """A model by its name, in any case.

    Raises:
        UsageError: not known; names what is near.
    """
    wanted = name.strip().lower()
    if wanted not in _BY_NAME:
        near = difflib.get_close_matches(wanted, _BY_NAME, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`memfabric perf presets` lists what is known"
        raise UsageError(f"no preset {name!r}; {hint}")
    return _BY_NAME[wanted]
