"""Environment variables that must stand before a library is imported: no network unless asked for, no telemetry."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import fields, is_dataclass

from configs.schema.model import HUB_PREFIX

NO_TELEMETRY = {
    # huggingface_hub reads the first three; transformers and datasets ask huggingface_hub.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    # datasets counts downloads of its own scripts with a request.
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    # transformers asks a hub service to convert pickled weights in the background.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
}

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def prepare_environment(cfg: object, environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what the libraries read on import; child processes inherit it.

    A config that names ``hf://`` somewhere may use the network, unless the user's own environment says offline.
    """
    environment.update(NO_TELEMETRY)
    if not names_hub(cfg):
        environment.update(OFFLINE)
    # The tokenizers' thread pool warns, and stays off, once a process forks; we fork nowhere while it runs.
    environment.setdefault("TOKENIZERS_PARALLELISM", "true")
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")


def names_hub(cfg: object) -> bool:
    """Whether a path in the config asks for the hub."""
    if isinstance(cfg, str):
        return cfg.startswith(HUB_PREFIX)
    if is_dataclass(cfg) and not isinstance(cfg, type):
        return any(names_hub(getattr(cfg, field.name)) for field in fields(cfg))
    return False
