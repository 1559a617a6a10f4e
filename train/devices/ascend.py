"""Huawei Ascend NPUs through torch_npu.

The real torch_npu API is tested on a pretended device (`crosstune doctor ascend-standin`), never on a card so far.
Its environment is settled in `ascend_environment.py`, its kernels are in `ascend_kernels.py`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from configs.schema.device import AscendConfig, DeviceConfig
from train.devices.accelerator import AcceleratorDevice, is_installed, text_version
from train.devices.ascend_environment import recorded, settle

if TYPE_CHECKING:
    from train.ops.kernel import Kernel

logger = logging.getLogger(__name__)

DRIVER_VERSION = Path("/usr/local/Ascend/driver/version.info")


class AscendDevice(AcceleratorDevice):
    """One NPU per process, collectives by HCCL."""

    name = "ascend"
    torch_type = "npu"
    backend = "hccl"
    deepspeed_accelerator = "npu"
    plugin = "torch_npu"
    load_hint = "source CANN's set_env.sh first; CANN, torch and torch_npu must match"
    unit = "NPU"
    lister = "npu-smi info"
    visible_devices_variable = "ASCEND_RT_VISIBLE_DEVICES"
    # CANN, "ASCEND_RT_VISIBLE_DEVICES": numbers and commas only; what follows anything else is not read.
    visible_entry = re.compile(r"\d+")
    out_of_memory_texts = (
        "NPU out of memory",
        "Malloc pin memory failed",
        "error code is 207001",  # ACL_ERROR_RT_MEMORY_ALLOCATION
        "EL0004",  # CANN, "error codes": memory allocation failed
    )

    def __init__(self, cfg: DeviceConfig) -> None:
        super().__init__(cfg)
        self.settings = cfg if isinstance(cfg, AscendConfig) else _with_defaults(cfg)

    @property
    def install_hint(self) -> str:  # type: ignore[override]  # known only where torch is
        """The version that belongs to this torch."""
        return f"pip install torch_npu=={_release(torch.__version__)}, which matches this torch"

    def _missing_plugin(self) -> str | None:
        """Settles the environment first: torch_npu and CANN read it once, on import."""
        if not is_installed("torch_npu"):
            return super()._missing_plugin()
        mismatch = _mismatch()
        if mismatch:
            return mismatch
        for note in settle(self.settings, os.environ):
            logger.info(note)
        return super()._missing_plugin()

    def missing_build(self) -> str | None:
        """A process in which torch.cuda means the NPU is not one in which anything can be relied on."""
        if "torch_npu.contrib.transfer_to_npu" in sys.modules:
            return (
                "transfer_to_npu has been imported here, which rewrites torch.cuda for every library; "
                "remove that import: crosstune names the NPU itself"
            )
        if "ASCEND_HOME_PATH" not in os.environ:  # DeepSpeed and operator compilation ask for it, by a KeyError
            return "torch_npu loads, but ASCEND_HOME_PATH is not set; source CANN's set_env.sh"
        return None

    def versions(self) -> dict[str, str]:
        """torch_npu, and what CANN's and the driver's own files say."""
        return super().versions() | cann_version(os.environ) | text_version("driver", DRIVER_VERSION, r"^Version=(\S+)")

    def fast_dtypes(self) -> tuple[torch.dtype, ...]:
        """bf16 on 910B and later; 910A and 310P have none."""
        return (torch.bfloat16, torch.float32) if self.runtime.is_bf16_supported() else (torch.float32,)

    def kernels(self, dtype: torch.dtype) -> Mapping[str, Kernel]:
        """torch_npu's fused operators."""
        from train.devices.ascend_kernels import KERNELS

        return KERNELS

    def variables(self) -> dict[str, str]:
        """What CANN, HCCL and torch_npu read."""
        return recorded(os.environ)

    def _activate(self, index: int) -> None:
        super()._activate(index)
        # The default differs between chips (on for 910A, off for 910B): say it.
        self.runtime.set_compile_mode(jit_compile=self.settings.jit_compile)
        self.runtime.config.allow_internal_format = self.settings.internal_format


def cann_version(environment: Mapping[str, str]) -> dict[str, str]:
    """``{"cann": version}`` from the files that its installers leave; empty where there are none."""
    home = environment.get("ASCEND_HOME_PATH") or environment.get("ASCEND_TOOLKIT_HOME")
    if not home:
        return {}
    root = Path(home)
    for file in sorted([*root.glob("ascend_*_install.info"), *root.glob("*/ascend_*_install.info")]):
        found = text_version("cann", file, r"^version=(\S+)")
        if found:
            return found
    # Of each part as "[internal:released]", such as runtime_running_version=[7.3.0.1.231:8.0.RC3].
    return text_version("cann", root / "version.cfg", r"^(?:runtime|toolkit)_running_version=\[[^\]:]*:([^\]]+)\]")


def _with_defaults(cfg: DeviceConfig) -> AscendConfig:
    """What `device=auto` has, and the defaults of the rest."""
    return AscendConfig(**{field.name: getattr(cfg, field.name) for field in fields(DeviceConfig)})


def _mismatch() -> str | None:
    """Of torch and torch_npu; loading an unmatched one ends in missing symbols, or worse."""
    try:
        plugin = version("torch_npu")
    except PackageNotFoundError:  # a source tree on the path
        return None
    ours, theirs = (_release(text).rpartition(".")[0] for text in (torch.__version__, plugin))
    if ours == theirs:
        return None
    return f"torch_npu {plugin} does not match torch {torch.__version__}; pip install torch_npu=={ours}.*"


def _release(text: str) -> str:
    """``2.13.0`` of ``2.13.0+cpu`` and of ``2.13.0.post1``."""
    return ".".join(text.partition("+")[0].split(".")[:3])
