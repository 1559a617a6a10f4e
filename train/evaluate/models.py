"""The models that evaluation compares: the base, the run's own trained model, an export in plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from configs.errors import CheckpointError
from configs.schema.model import Precision
from train.devices.base import DTYPES, Device
from train.export.trained import Trained
from train.export.updates import adapter_of
from train.models.load import load_model


def compute_dtype(working: torch.dtype, device: Device, asked: Precision = Precision.auto) -> torch.dtype:
    """What evaluation computes in: the working weights' format, but fp32 on CPUs and where that format does not work.

    The weights keep the rounding they had in training either way.

    Args:
        working: format of the working weights.
        device: where it computes.
        asked: by `eval.precision`.

    Raises:
        DeviceError: it was asked for by name and does not work there.
    """
    if asked is not Precision.auto:
        if (fault := device.precision_fault(asked, "eval.precision")) is not None:
            raise fault
        return DTYPES[asked]
    return torch.float32 if device.torch_type == "cpu" or not device.supports(working) else working


def base_model(trained: Trained, device: Device, asked: Precision = Precision.auto) -> Any:
    """The base as it was trained on, in evaluation mode, on the device; `asked`: see `compute_dtype`.

    Raises:
        DeviceError: the precision that was asked for does not work there.
        ModelError: it does not open.
    """
    dtype = compute_dtype(trained.working_dtype, device, asked)
    # Loading, unlike a cast, leaves in fp32 what the family keeps so, and angles of positions. What a run rounded to
    # bf16 stays rounded where it computes in fp32.
    loaded = torch.bfloat16 if torch.bfloat16 in (dtype, trained.working_dtype) else dtype
    model = load_model(trained.base_dir, dtype=loaded, trust_remote_code=trained.cfg.model.trust_remote_code)
    return model.to(device.torch_device) if loaded == dtype else model.to(device.torch_device, dtype)


def plain_model(
    folder: Path,
    working: torch.dtype,
    device: Device,
    trust_remote_code: bool = False,
    asked: Precision = Precision.auto,
) -> Any:
    """A model folder as anyone opens it with plain transformers."""
    dtype = compute_dtype(working, device, asked)
    return load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code).to(device.torch_device)


@torch.no_grad()
def put_training_on(model: Any, trained: Trained) -> Any:
    """Turns the base into the run's own trained model, in place: adapters unmerged, or weights replaced.

    Raises:
        CheckpointError: the checkpoint holds parameters that the model has not.
    """
    wrapped = model
    if trained.is_lora:
        wrapped = adapter_of(trained, model)
    parameters = dict(wrapped.named_parameters())
    strange = [name for name in trained.reader.params if name not in parameters]
    if strange:
        raise CheckpointError(
            str(trained.checkpoint),
            f"{len(strange)} parameters that the base model has no place for: {', '.join(strange[:5])}",
            remedy="the base model is not the one that was trained",
        )
    for name in trained.reader.params:
        parameters[name].copy_(trained.reader.read(name))
    return model.eval()
