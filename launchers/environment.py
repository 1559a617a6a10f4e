"""Environment variables that must stand before a library is imported.

No network unless asked for, no telemetry, plugins of torch only where they are wanted, a device's run-time settings.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import MutableMapping
from dataclasses import fields, is_dataclass

from configs.schema.device import AscendConfig, DeviceConfig
from configs.schema.doctor import DoctorConfig, PortabilityConfig, StandinConfig
from configs.schema.model import HUB_PREFIX
from configs.schema.roots import EvalJobConfig, TrainConfig

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


def prepare_environment(cfg: object, environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Sets what the libraries read on import; child processes inherit it.

    A config that names ``hf://`` somewhere may use the network, unless the user's own environment says offline.

    Returns:
        Notes for the user on values of theirs that were replaced.

    Raises:
        DeviceError: variables of the device are misspelt, out of range or contradictory.
    """
    environment.update(NO_TELEMETRY)
    if not names_hub(cfg):
        environment.update(OFFLINE)
    # The tokenizers' thread pool warns, and stays off, once a process forks; we fork nowhere while it runs.
    environment.setdefault("TOKENIZERS_PARALLELISM", "true")
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # `import torch` would load every installed plugin, and fail with one whose driver is not there, for any device.
    # The device layer imports the one that it needs.
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # A doctor looks at the settings instead: it must answer where they are wrong, too.
    ascend = ascend_config(cfg.device) if isinstance(cfg, (TrainConfig, EvalJobConfig)) else None
    if ascend is None:
        return []
    from train.devices.ascend_environment import settle

    return settle(ascend, environment)


def keep_out_plugins(cfg: object) -> None:
    """Keeps torch_npu out of a process that does not work on an Ascend.

    transformers imports it wherever it is installed. That takes seconds, rewrites parts of torch, and fails where CANN
    is not there, as on a login node. A module that is None in `sys.modules` counts as not installed.
    """
    works_there = isinstance(cfg, (TrainConfig, EvalJobConfig)) and ascend_config(cfg.device) is not None
    # The doctor's commands look at devices in processes of their own.
    looks = isinstance(cfg, (DoctorConfig, PortabilityConfig, StandinConfig))
    if works_there or looks or "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is None:
        return
    sys.modules["torch_npu"] = None  # type: ignore[assignment]  # what the import system documents


def ascend_config(device: DeviceConfig) -> AscendConfig | None:
    """Ascend's settings for a run on `device`; None where it cannot end on an Ascend."""
    if isinstance(device, AscendConfig):
        return device
    # find_spec imports nothing: torch_npu reads its variables when it is loaded, which must come later.
    if device._target_.endswith(".AutoDevice") and importlib.util.find_spec("torch_npu") is not None:
        return AscendConfig(**{each.name: getattr(device, each.name) for each in fields(DeviceConfig)})
    return None


def names_hub(cfg: object) -> bool:
    """Whether a path in the config asks for the hub."""
    if isinstance(cfg, str):
        return cfg.startswith(HUB_PREFIX)
    if is_dataclass(cfg) and not isinstance(cfg, type):
        return any(names_hub(getattr(cfg, field.name)) for field in fields(cfg))
    return False
