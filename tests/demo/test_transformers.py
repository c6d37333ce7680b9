"""The transformers connector: fingerprints, where blocks lie in a cache, and reuse with a small random model."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import memfabric
from memfabric.demo import DemoOptions
from memfabric.demo.children import run_pool
from memfabric.engines import transformers as engine
from memfabric.errors import RefusedError, UsageError
from memfabric.units import MIB

_REASON = "needs torch and transformers: pip install 'memfabric[demo]'"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)

BLOCK_TOKENS = 8


def config(**changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    return transformers.LlamaConfig(**{**sizes, **changes})


def of(**changes: Any) -> Any:
    return engine.fingerprint(
        config(**changes), model="tiny", revision="r1", block_tokens=BLOCK_TOKENS, dtype="float32"
    )


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(5)
    torch.set_num_threads(1)
    made = transformers.LlamaForCausalLM(config()).eval()
    with torch.no_grad():  # the default initialisation is so small that every token is equally likely
        for parameter in made.parameters():
            parameter.mul_(8.0)
    return made


@pytest.fixture(scope="module")
def pool_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("shm")
    options = DemoOptions(node_bytes=8 * MIB, region_bytes=1 * MIB, shm_directory=directory, step_timeout_s=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMFABRIC_SHM_DIRECTORY", str(directory))
        with run_pool(options) as pool:
            yield pool.address


def connect(address: str, name: str, fingerprint: Any) -> Any:
    spec = engine.namespace_spec(name, fingerprint)
    return memfabric.connect(address, namespace=name, fingerprint=fingerprint, create=spec)


def prompt(length: int, seed: int = 1) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(2, 128, length)]


def block_bytes(layout: Any, block: int) -> bytes:
    """A block as the layout describes it, read without the native code."""
    parts = [
        ctypes.string_at(int(base) + block * int(stride), int(size))
        for base, stride, size, *_ in layout.fragments.tolist()
    ]
    return b"".join(parts)


def expected_block(cache: Any, block: int) -> npt.NDArray[np.float32]:
    """Layer, K/V, head, token, dim."""
    tokens = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
    layers = [
        np.stack([layer.keys[0, :, tokens].numpy(), layer.values[0, :, tokens].numpy()]) for layer in cache.layers
    ]
    return np.ascontiguousarray(np.stack(layers))


def filled_dynamic_cache(tokens: int) -> Any:
    cache = transformers.DynamicCache()
    for layer in range(3):
        cache.update(torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8), layer)
    return cache


# --- fingerprints ------------------------------------------------------------------------------------------------


def test_fingerprint_and_namespace_follow_the_config() -> None:
    found = of()
    assert (found.layers, found.kv_heads, found.head_dim, found.dtype, found.layout) == (3, 2, 8, "float32", "LKHTD")
    spec = engine.namespace_spec("n", found)
    assert spec.segments == 3
    assert spec.block_bytes == 3 * 2 * 2 * BLOCK_TOKENS * 8 * 4
    assert of().digest() == found.digest() != of(num_hidden_layers=2).digest()


def test_heads_and_dtype_default_as_in_transformers() -> None:
    plain = transformers.GPTNeoXConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=32)
    found = engine.fingerprint(plain, model="m", revision="r", dtype="bfloat16")
    assert (found.kv_heads, found.head_dim, found.block_tokens) == (4, 8, 16)
    with pytest.raises(UsageError, match="names no dtype"):
        engine.fingerprint(plain, model="m", revision="r")
    plain.dtype = torch.float16
    assert engine.fingerprint(plain, model="m", revision="r").dtype == "float16"


def test_sliding_windows_are_refused() -> None:
    sliding = transformers.MistralConfig(sliding_window=64)
    with pytest.raises(UsageError, match="full attention in every layer"):
        engine.fingerprint(sliding, model="m", revision="r", dtype="float32")
    mixed = transformers.Gemma2Config(num_hidden_layers=2)
    with pytest.raises(UsageError, match="sliding_attention"):
        engine.fingerprint(mixed, model="m", revision="r", dtype="float32")


def test_bad_block_tokens_and_dtypes_are_refused() -> None:
    with pytest.raises(UsageError, match="block_tokens"):
        engine.fingerprint(config(), model="m", revision="r", block_tokens=0, dtype="float32")
    odd = engine.fingerprint(config(), model="m", revision="r", dtype="float12")
    with pytest.raises(UsageError, match="float12"):
        engine.namespace_spec("n", odd)
    with pytest.raises(UsageError, match="float12"):
        engine.allocate_cache(odd, 8)


def test_the_revision_is_the_content_of_the_weights(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="safetensors"):
        engine.weights_revision(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = engine.weights_revision(tmp_path)
    assert first.startswith("sha256:")
    assert engine.weights_revision(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert engine.weights_revision(tmp_path) != first


# --- where blocks lie --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [BLOCK_TOKENS, 3 * BLOCK_TOKENS, 3 * BLOCK_TOKENS + 5])
def test_layout_of_a_dynamic_cache(tokens: int) -> None:
    cache = filled_dynamic_cache(tokens)
    layout = engine.paged_layout(cache, of())
    assert (layout.segments, layout.block_bytes) == (3, engine.namespace_spec("n", of()).block_bytes)
    assert len(layout.fragments) == 3 * 2 * 2
    assert (layout.min_id, layout.max_id) == (0, tokens // BLOCK_TOKENS - 1)
    for block in range(tokens // BLOCK_TOKENS):
        assert block_bytes(layout, block) == expected_block(cache, block).tobytes()


def test_layout_of_a_preallocated_cache_covers_its_room() -> None:
    cache = engine.allocate_cache(of(), 5 * BLOCK_TOKENS + 3)
    assert cache.get_seq_length() == 0
    layout = engine.paged_layout(cache, of())
    assert (layout.min_id, layout.max_id) == (0, 4)
    for layer in cache.layers:
        layer.keys_room.normal_()
        layer.values_room.normal_()
        layer.fill(4 * BLOCK_TOKENS)
    assert block_bytes(layout, 3) == expected_block(cache, 3).tobytes()


def test_tensors_that_do_not_fit_are_refused() -> None:
    cache = filled_dynamic_cache(16)
    with pytest.raises(UsageError, match="has 3 layers, the fingerprint 4"):
        engine.paged_layout(cache, of(num_hidden_layers=4))
    with pytest.raises(UsageError, match=r"keys of layer 0 is float32 \[1, 2, 16, 8\]"):
        engine.paged_layout(cache, of(num_key_value_heads=3))
    cache.layers[1].values = cache.layers[1].values.to(torch.float64)
    with pytest.raises(UsageError, match="values of layer 1 is float64"):
        engine.paged_layout(cache, of())
    cache.layers[1].values = torch.randn(1, 2, 8, 16).transpose(2, 3)
    with pytest.raises(UsageError, match="not contiguous per head"):
        engine.paged_layout(cache, of())
    with pytest.raises(UsageError, match="empty"):
        engine.paged_layout(transformers.DynamicCache(config=config()), of())


def test_preallocated_layers_hold_what_dynamic_layers_hold() -> None:
    """Through appending in the room, cropping, running out of room, and going on."""
    cache = engine.allocate_cache(of(), 20)
    other = transformers.DynamicCache(config=config())
    room = [layer.keys_room.data_ptr() for layer in cache.layers]
    for step, tokens in enumerate([7, 1, 4, -3, 6, 1, 9, 1]):
        for index in range(3):
            if tokens < 0:
                continue
            states = torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8)
            for one, two in zip(cache.update(*states, index), other.update(*states, index), strict=True):
                assert torch.equal(one, two), step
        if tokens < 0:
            cache.crop(tokens)
            other.crop(tokens)
        assert cache.get_seq_length() == other.get_seq_length()
        within = cache.get_seq_length() <= 20
        assert [layer.keys.data_ptr() == at for layer, at in zip(cache.layers, room, strict=True)] == [within] * 3


# --- through a pool ----------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_reuse_changes_no_token_and_computes_less(pool_address: str, model: Any) -> None:
    ids, other = prompt(61), [*prompt(61)[:30], *prompt(40, seed=2)]
    fingerprint = of()
    cold = engine.PooledModel(model, None, fingerprint)
    with connect(pool_address, "reuse", fingerprint) as writer, connect(pool_address, "reuse", fingerprint) as reader:
        first = engine.PooledModel(model, writer, fingerprint).generate(ids, 12)
        assert (first.reused_tokens, first.stored.stored_count) == (0, 7)
        pooled = engine.PooledModel(model, reader, fingerprint)
        again = pooled.generate(ids, 12)
        assert (again.reused_tokens, again.reused_blocks) == (56, 7)
        assert again.bytes_read == 7 * reader.namespace.block_bytes
        assert again.stored.ok
        assert again.stored.stored_count == 0
        shared = pooled.generate(other, 12)
        assert (shared.reused_tokens, shared.stored.stored_count) == (24, 5)
    assert first.token_ids == again.token_ids == cold.generate(ids, 12).token_ids
    assert shared.token_ids == cold.generate(other, 12).token_ids


@pytest.mark.processes
def test_one_token_is_always_left_to_compute(pool_address: str, model: Any) -> None:
    ids = prompt(4 * BLOCK_TOKENS)
    with connect(pool_address, "whole", of()) as client:
        pooled = engine.PooledModel(model, client, of())
        expected = pooled.generate(ids, 5).token_ids
        again = pooled.generate(ids, 5)
        assert (again.reused_blocks, again.token_ids) == (3, expected)
        assert pooled.generate(ids[:1], 2).reused_blocks == 0


@pytest.mark.processes
def test_a_dynamic_cache_is_stored_and_a_prefix_serves_generate(pool_address: str, model: Any) -> None:
    """The functions alone, with transformers' own cache before and its own generation after."""
    ids = prompt(50, seed=9)
    with connect(pool_address, "functions", of()) as client, torch.inference_mode():
        cache = transformers.DynamicCache(config=model.config)
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        assert engine.store_prefix(client, ids, cache).stored_count == 6
        prefix = engine.load_prefix(client, ids, capacity_tokens=60)
        assert prefix.token_count == 48
        for mine, theirs in zip(prefix.cache.layers, cache.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys[:, :, :48])
            assert torch.equal(mine.values, theirs.values[:, :, :48])
        options = {"max_new_tokens": 8, "do_sample": False}
        cold = model.generate(torch.tensor([ids]), **options)
        warm = model.generate(torch.tensor([ids]), past_key_values=prefix.cache, **options)
        assert torch.equal(cold, warm)


@pytest.mark.processes
def test_other_weights_are_never_read(pool_address: str, model: Any) -> None:
    ids = prompt(40)
    other = engine.fingerprint(config(), model="tiny", revision="r2", block_tokens=BLOCK_TOKENS, dtype="float32")
    with connect(pool_address, "weights", of()) as client:
        engine.PooledModel(model, client, of()).generate(ids, 1)
        with pytest.raises(UsageError, match="revision: 'r2' asked, 'r1' stored"):
            engine.PooledModel(model, client, other)
        with pytest.raises(RefusedError, match="revision"):
            connect(pool_address, "weights", other)


@pytest.mark.processes
def test_bad_calls_are_refused(pool_address: str, model: Any) -> None:
    with connect(pool_address, "calls", of()) as client:
        with pytest.raises(UsageError, match="token_ids is empty"):
            engine.load_prefix(client, [])
        with pytest.raises(UsageError, match="capacity_tokens 3 is less"):
            engine.load_prefix(client, prompt(4), capacity_tokens=3)
        with pytest.raises(UsageError, match="holds 16 tokens, fewer than the 17"):
            engine.store_prefix(client, prompt(17), filled_dynamic_cache(16))
        assert engine.store_prefix(client, prompt(3), filled_dynamic_cache(16)).stored_count == 0
        with pytest.raises(UsageError, match="new_tokens"):
            engine.PooledModel(model, client, of()).generate(prompt(9), 0)
    with pytest.raises(UsageError, match="token_ids is empty"):
        engine.PooledModel(model, None, of()).generate([], 1)
