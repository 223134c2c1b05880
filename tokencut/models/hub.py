"""Pretrained weights: first from the caches of the hub and of torch, then from the hub, asked once with a time limit.

timm alone would ask even for what is cached, and an unreachable hub can take it minutes of retries to give up.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import EntryNotFoundError, get_session
from timm.models import PretrainedCfg

from tokencut.errors import ModelError
from tokencut.messages import one_line
from tokencut.models.checkpoints import INDEX, shard_names
from tokencut.models.huggingface import is_transformers

# Failing takes five seconds in all, of which starting takes more than three on a slow machine.
SECONDS = 1.5

CONFIG = "config.json"
# As timm looks for them, safetensors first.
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# Where transformers says how images are prepared; the second holds a processor of text and images.
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")

OTHER_WAYS = "give `checkpoint='FILE'`, `pretrained=False` for random weights, or the bundled model 'digits'"


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object out of a file; None where there is none in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def cached_weights(cfg: PretrainedCfg) -> Path | None:
    """The file of weights that a timm description names, where a cache has it; nothing is asked.

    Args:
        cfg: timm's description of pretrained weights.
    """
    if cfg.hf_hub_id:
        names = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else WEIGHTS
        found = next((path for name in names if (path := _cached(cfg.hf_hub_id, name))), None)
        if found:
            return found
    if not cfg.url:
        return None
    name = Path(urlsplit(cfg.url).path).name if isinstance(cfg.url, str) else cfg.url[1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    return path if path.is_file() else None


def address(cfg: PretrainedCfg) -> str:
    """The address of weights that are not on the hub."""
    return cfg.url if isinstance(cfg.url, str) else cfg.url[0] if cfg.url else ""


def cached_repository(repository: str, weights: bool) -> Path | None:
    """The folder in the hub's cache that holds a repository's config, and its weights where they are wanted.

    Args:
        repository: `owner/name`, or `owner/name@revision`.
        weights: Whether weights must be there too.
    """
    config = _cached(repository, CONFIG)
    if config is None or not weights:
        return config.parent if config else None
    folder = config.parent
    if any((folder / name).is_file() for name in WEIGHTS):
        return folder
    index = next((folder / name for name in INDEX if (folder / name).is_file()), None)
    return folder if index is not None and all((folder / name).is_file() for name in shard_names(index)) else None


def fetch_repository(repository: str, weights: bool) -> Path:
    """Downloads a repository's config, and its weights where they are wanted, into the hub's cache.

    Args:
        repository: `owner/name`, or `owner/name@revision`.
        weights: Whether to download the weights too.

    Returns:
        The folder in the cache.

    Raises:
        ModelError: The hub does not answer, or has no such files.
    """
    name, _, revision = repository.partition("@")
    try:
        _require_answer(hf_hub_url(name, CONFIG, revision=revision or None), f"'hf-hub:{repository}'")
        folder = Path(hf_hub_download(name, CONFIG, revision=revision or None)).parent
        for file in (*PREPROCESSORS, "README.md") if is_transformers(read_object(folder / CONFIG)) else ():
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(name, file, revision=revision or None)
        for file in (*WEIGHTS, *INDEX) if weights else ():
            try:
                found = Path(hf_hub_download(name, file, revision=revision or None))
            except EntryNotFoundError:
                continue
            for part in shard_names(found) if file in INDEX else ():
                hf_hub_download(name, part, revision=revision or None)
            return found.parent
    except ModelError:
        raise
    except Exception as error:  # whatever the hub's client and the network below it raise
        raise download_failed(f"'hf-hub:{repository}'", error) from error
    if weights:
        raise ModelError(f"the hub's repository {name} has none of {', '.join(WEIGHTS)}; give `checkpoint='FILE'`")
    return folder


def require_hub(cfg: PretrainedCfg, model: str) -> None:
    """Asks, once, the place that a timm description names for its weights.

    Args:
        cfg: timm's description of pretrained weights.
        model: The model's name, for the message.

    Raises:
        ModelError: There is no answer in time, or `HF_HUB_OFFLINE` forbids to ask.
    """
    if cfg.hf_hub_id:
        name, _, revision = cfg.hf_hub_id.partition("@")
        _require_answer(hf_hub_url(name, cfg.hf_hub_filename or WEIGHTS[0], revision=revision or None), model)
    elif cfg.url:
        _require_answer(address(cfg), model)


def download_failed(model: str, error: Exception) -> ModelError:
    """The error for a download that began and went wrong."""
    return ModelError(f"the weights of {model} could not be downloaded ({one_line(error)}); {OTHER_WAYS}")


def _require_answer(place: str, model: str) -> None:
    host = urlsplit(place).netloc
    why = f"{host} is not asked, as HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _ask(place)
    if why:
        raise ModelError(f"the weights of {model} are not in the cache, and {why}; {OTHER_WAYS}")


def _ask(place: str) -> str | None:
    """What is wrong with the answer to one request, or None."""
    host = urlsplit(place).netloc
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def request() -> None:
        try:
            status = get_session().head(place, timeout=SECONDS).status_code
            # A hub that has no such file has answered: timm then says which file.
            answers.put(f"{host} answers with status {status}" if status == 407 or status >= 500 else None)
        except Exception as error:  # noqa: BLE001 (whatever the hub's client and the network raise is reported)
            proxy = "ProxyError" in type(error).__name__  # it answered, and the host was never asked
            said = f"the proxy on the way to {host} answers" if proxy else f"{host} does not answer"
            answers.put(f"{said} ({one_line(error)})")

    # The client's timeouts do not cover the name's look-up, which alone can hang for longer than a user waits.
    threading.Thread(target=request, daemon=True, name="tokencut-hub").start()
    try:
        return answers.get(timeout=SECONDS)
    except queue.Empty:
        return f"{host} does not answer (nothing within {SECONDS} s)"


def _cached(repository: str, name: str) -> Path | None:
    repository, _, revision = repository.partition("@")
    found = try_to_load_from_cache(repository, name, revision=revision or None)
    return Path(found) if isinstance(found, (str, os.PathLike)) and Path(found).is_file() else None
