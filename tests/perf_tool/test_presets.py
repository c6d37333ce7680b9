"""Block sizes of models: the arithmetic, against figures that were published or worked out by hand."""

from __future__ import annotations

import pytest

from memfabric.errors import UsageError
from memfabric.perf.presets import MODELS, find


@pytest.mark.parametrize(
    ("name", "dtype", "tp", "token_bytes"),
    [
        ("llama-3-8b", "bf16", 1, 131072),  # 2 x 32 x 8 x 128 x 2: the well-known 128 KiB
        ("llama-3-70b", "bf16", 1, 327680),  # 2 x 80 x 8 x 128 x 2: 320 KiB
        ("llama-3-70b", "bf16", 8, 40960),
        ("llama-3-70b", "fp8", 8, 20480),
        ("qwen3-8b", "bf16", 1, 147456),  # 2 x 36 x 8 x 128 x 2
        ("qwen3-32b", "bf16", 1, 262144),
        ("mistral-7b", "fp16", 1, 131072),
        ("gemma-2-9b", "bf16", 1, 344064),  # 2 x 42 x 8 x 256 x 2
        ("deepseek-v3", "bf16", 1, 70272),  # 61 x (512 + 64) x 2, as DeepSeek's paper has it: 70 KB a token
        ("deepseek-v3", "bf16", 8, 70272),  # the latent is on every rank
        ("deepseek-v3", "fp8", 1, 35136),
        ("llama-3-8b", "bf16", 16, 2 * 32 * 1 * 128 * 2),  # more ranks than heads: one head each
        ("smollm2-135m", "fp32", 1, 2 * 30 * 3 * 64 * 4),
    ],
)
def test_bytes_of_a_token(name: str, dtype: str, tp: int, token_bytes: int) -> None:
    assert find(name).token_bytes(tp=tp, dtype=dtype) == token_bytes
    assert find(name).block_bytes(16, tp=tp, dtype=dtype) == 16 * token_bytes


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_follows_its_own_formula(model: object) -> None:
    from memfabric.perf.presets import Model

    assert isinstance(model, Model)
    product = eval(model.formula.replace("x", "*"), {"type": 2})  # what people read is what is computed
    assert model.token_bytes() == product
    assert model.latent != bool(model.kv_heads)
    assert find(model.name.upper()) is model


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match=r"did you mean .*llama-3-8b"):
        find("llama3-8b")
    with pytest.raises(UsageError, match="presets"):
        find("zzz")
    with pytest.raises(UsageError, match="8 KV heads"):
        find("llama-3-8b").token_bytes(tp=3)
    with pytest.raises(UsageError, match="at least one rank"):
        find("llama-3-8b").token_bytes(tp=0)
    with pytest.raises(UsageError, match="unknown type"):
        find("deepseek-v3").token_bytes(dtype="int3")
    with pytest.raises(UsageError, match="1 to 4096 tokens"):
        find("llama-3-8b").block_bytes(0)
