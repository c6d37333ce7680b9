"""One process of the demonstration: ``python -m memfabric.demo.worker PARENT_PID JOB``.

It runs the model and talks to the pool as a client; standard output carries its events (`messages`), standard
error what libraries have to say. It ends with its parent, even when that is killed.

``… PARENT_PID up ARGUMENTS…`` becomes ``memfabric up ARGUMENTS…`` instead, so that the pool too ends with the
demonstration.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from memfabric.demo import messages, prompts
from memfabric.errors import MemfabricError
from memfabric.processes import die_with_parent

ATTENTION = "sdpa"
"""Deterministic on CPU for a given number of threads, and faster than eager; the demo compares the tokens anyway."""
_WARM_UP_TOKENS = 64


def main(arguments: list[str]) -> int:
    """Do a job; the exit code."""
    die_with_parent(int(arguments[0]))
    if arguments[1] == "up":
        os.execv(sys.executable, [sys.executable, "-m", "memfabric", *arguments[1:]])
    job = msgspec.json.decode(arguments[1], type=messages.Job)
    try:
        if isinstance(job, messages.Convert):
            _convert(job)
        else:
            _serve(job)
    except (MemfabricError, OSError) as error:
        _tell(messages.Failed(f"{error}"))
        return 1
    return 0


def _tell(event: messages.Event) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
    sys.stdout.buffer.flush()


def _status(text: str) -> None:
    _tell(messages.Status(text))


def _convert(job: messages.Convert) -> None:
    from memfabric.demo import model

    _tell(messages.Converted(str(model.prepare(Path(job.cache), _status))))


def _serve(job: messages.Serve) -> None:
    import memfabric
    from memfabric.demo.model import MODEL, read_revision
    from memfabric.engines import transformers as engine

    _status("loading the model")
    directory = Path(job.model_dir)
    model, tokenizer = _load(directory)
    of = engine.fingerprint(
        model.config, model=MODEL, revision=read_revision(directory), block_tokens=job.block_tokens, dtype="float32"
    )
    spec = engine.namespace_spec(job.namespace or "none", of)
    with contextlib.ExitStack() as stack:
        client = None
        if job.address:
            client = memfabric.connect(
                job.address,
                namespace=job.namespace,
                fingerprint=of,
                create=spec,
                shm_directory=job.shm_directory or None,
                transport=job.transport,
            )
            stack.enter_context(client)
        pooled = engine.PooledModel(model, client, of)
        requests = [(name, _tokens(tokenizer, name)) for name in job.prompts]
        engine.PooledModel(model, None, of).generate(requests[0][1][:_WARM_UP_TOKENS], 2)
        _tell(
            messages.Loaded(
                revision=of.revision,
                dtype=of.dtype,
                attention=ATTENTION,
                block_bytes=spec.block_bytes,
                versions=_versions(),
            )
        )
        for name, token_ids in requests:
            _tell(_run(pooled, tokenizer, name, token_ids, job))


def _run(pooled: Any, tokenizer: Any, name: str, token_ids: list[int], job: messages.Serve) -> messages.Served:
    """Measure the time to first token some times, the last time with storing and with all tokens."""
    first_token_s: list[float] = []
    load_s: list[float] = []
    for repeat in range(job.repeats):
        last = repeat == job.repeats - 1
        _status(f"run {repeat + 1} of {job.repeats}: {prompts.TITLES[name]}")
        done = pooled.generate(token_ids, job.new_tokens if last else 1, store=last)
        first_token_s.append(done.first_token_s)
        load_s.append(done.load_s)
    stored = done.stored
    return messages.Served(
        name=name,
        prompt_tokens=done.prompt_tokens,
        reused_tokens=done.reused_tokens,
        blocks_read=done.reused_blocks,
        bytes_read=done.bytes_read,
        blocks_written=stored.stored_count if stored else 0,
        bytes_written=stored.bytes_written if stored else 0,
        first_token_s=first_token_s,
        load_s=load_s,
        store_s=done.store_s,
        tokens=done.token_ids,
        text=str(tokenizer.decode(done.token_ids, skip_special_tokens=True)),
        problem="" if stored is None or stored.ok else repr(stored),
        transport="" if pooled.client is None else str(pooled.client.stats()["transport"]),
    )


def _load(directory: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # one a process: fastest where processes share few cores, and always the same sums
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=ATTENTION)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def _tokens(tokenizer: Any, name: str) -> list[int]:
    """A prompt's token ids, with the model's own chat template."""
    text = tokenizer.apply_chat_template(prompts.conversation(name), tokenize=False, add_generation_prompt=True)
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _versions() -> dict[str, str]:
    import platform

    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
