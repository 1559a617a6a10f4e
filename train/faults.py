"""What goes wrong on a device while a run computes, told by where it happened, what was set, and what helps.

The place comes from the frames of the traceback: they know the step, the phase and the module, and so the step loop
keeps no books for the day that something fails. Not covered: faults that torch does not raise, such as a kernel that
hangs (the collectives' timeout ends those), and a process that is killed (`launchers/torchrun.py`).
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from configs.errors import CrosstuneError, DeviceError, OutOfMemoryError
from configs.schema.model import Precision
from configs.schema.outputs import EvalConfig
from configs.schema.roots import Packing, TrainConfig
from configs.schema.sharding import ZeroConfig
from train.devices.base import Device
from train.engine.base import Engine
from train.loop import Loop
from train.ops.packing_check import check_packing
from train.units import in_gib

MODEL, ENGINE, CHECK = "model", "engine", "check of packed rows"
"""Phases before the first step: the weights go to the device; the engine is built over them; rows are tried."""
PHASES = {
    (Loop, "take_step"): "forward pass",  # what follows it has an engine's name
    (Loop, "validation_loss"): "validation",
    (Loop, "save"): "checkpoint",
    (Engine, "__init__"): ENGINE,
    (Engine, "backward"): "backward pass",
    (Engine, "step"): "optimizer step",
}
"""The innermost of these frames says what was at work."""
OF_WEIGHTS = (MODEL, ENGINE, "optimizer step", "checkpoint")
"""Phases in which weights and optimizer state fill the memory; in the others activations come on top."""

ASKED = (
    re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMGT]iB)"),
    re.compile(r"Unable to allocate ([\d.]+) ?(bytes|[KMGT]iB)"),  # numpy's MemoryError
)
UNITS = {unit: 1024**power for power, unit in enumerate(("bytes", "KiB", "MiB", "GiB", "TiB"))}
NO_KERNEL = (
    re.compile(r"Could not run '([^']+)' with arguments from the"),  # torch's dispatcher
    re.compile(r"The operator '([^']+)' is not currently (?:implemented|supported)"),  # backends with a fallback switch
    re.compile(r"\"([^\"]+)\" not implemented for '([^']+)'"),  # a kernel that lacks a number format
)


@dataclass(frozen=True)
class Place:
    """Where in a run an error came up."""

    step: int | None
    """Counted from 1; None before the first."""
    phase: str
    module: str | None
    """Path and class of the innermost module at work; None outside the model, and in most of a backward pass."""

    def __str__(self) -> str:
        if self.phase == MODEL:
            return "while the model was moved there"
        if self.phase == ENGINE:
            return "while masters and gradient buffers were made"
        return f"in the {self.phase}" + (f" of step {self.step}" if self.step is not None else "")


@contextmanager
def told(device: Device, cfg: TrainConfig | EvalConfig, *, rank: int = 0, world_size: int = 1) -> Iterator[None]:
    """Turns errors that mean "no memory" and "no such kernel" into messages that say what to change.

    Args:
        device: activated.
        cfg: what was set; the remedies are other values of it.
        rank: of this process.
        world_size: processes of the run.

    Raises:
        OutOfMemoryError: memory of the device or of the host ran out.
        DeviceError: an operator has no kernel on the device.
    """
    try:
        yield
    except CrosstuneError:
        raise
    except Exception as error:
        who = str(device.torch_device) + (f" (rank {rank})" if world_size > 1 else "")
        if device.is_out_of_memory(error):
            raise _no_memory(error, device, cfg, who, world_size) from error
        if (operator := unsupported_operator(error)) is not None:
            raise _no_kernel(operator, place_of(error), device, cfg, who) from error
        raise


def place_of(error: BaseException) -> Place:
    """Reads step, phase and module from the frames that the error passed."""
    step: int | None = None
    phase = MODEL
    root: nn.Module | None = None
    innermost: nn.Module | None = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if frame.f_code is check_packing.__code__:
            phase = CHECK
        for (kind, name), what in PHASES.items():
            if isinstance(owner, kind) and frame.f_code.co_name == name:
                phase = what
        if isinstance(owner, Loop) and "state" in frame.f_locals:
            # The state counts finished steps; only a step that is under way is one more.
            step = frame.f_locals["state"].step + (frame.f_code.co_name == "take_step")
        if isinstance(owner, Engine):
            root = getattr(owner, "module", None)
        elif isinstance(owner, nn.Module) and frame.f_code.co_name == "forward":
            root, innermost = root or owner, owner
            phase = "forward pass" if phase == MODEL else phase  # an evaluation has no loop
    names = {} if root is None else {id(module): name for name, module in root.named_modules()}
    path = names.get(id(innermost)) if innermost is not None else None
    return Place(step, phase, f"{path} ({type(innermost).__name__})" if path else None)


def unsupported_operator(error: BaseException) -> str | None:
    """The operator, and the number format if that is what it lacks; None where the error means something else."""
    if not isinstance(error, (NotImplementedError, RuntimeError)):
        return None
    for pattern in NO_KERNEL:
        if found := pattern.search(str(error)):
            operator, *dtype = found.groups()
            return operator + "".join(f" for {name}" for name in dtype)
    return None


def _no_kernel(operator: str, place: Place, device: Device, cfg: TrainConfig | EvalConfig, who: str) -> DeviceError:
    where = f"{place.module}, " if place.module else ""
    model = f"model.path={cfg.model.path}" if isinstance(cfg, TrainConfig) else "model.path=..."
    return DeviceError(
        f"device={device.name}",
        f"{who} has no kernel for {operator}, which {where or 'the run '}needs {place}",
        remedy=f"crosstune doctor portability {model} device={device.name} lists all that it lacks at once; "
        "a newer version of the device's plugin may have it, device=cpu has it",
    )


def _no_memory(
    error: BaseException, device: Device, cfg: TrainConfig | EvalConfig, who: str, world_size: int
) -> OutOfMemoryError:
    place = place_of(error)
    cause = _that_says_how_much(error)
    asked = _asked_bytes(str(cause))
    on_host = device.torch_type != "cpu" and not isinstance(cause, torch.OutOfMemoryError) and _is_host(cause)
    found = f"out of {'host memory' if on_host else 'memory'} {place}"
    if asked:
        found += f": {in_gib(asked)} more were asked for"
    if not on_host:
        memory = device.memory()
        found += f"{',' if asked else ':'} this process holds {in_gib(memory.used_bytes)}"
        found += f" of {in_gib(memory.total_bytes)}" if memory.total_bytes else ""
    remedies = _host_remedies(cfg) if on_host else _remedies(cfg, place, device, world_size)
    return OutOfMemoryError(who, f"{found}; {', '.join(_settings(cfg))}", remedy=", then ".join(remedies))


def _that_says_how_much(error: BaseException) -> BaseException:
    """The error itself, or the one that it came from, if only that tells the size."""
    cause: BaseException | None = error
    while cause is not None:
        if _asked_bytes(str(cause)):
            return cause
        cause = cause.__cause__
    return error


def _is_host(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def _asked_bytes(text: str) -> int | None:
    for pattern in ASKED:
        if found := pattern.search(text):
            return int(float(found[1]) * UNITS[found[2]])
    return None


def sharding_name(cfg: TrainConfig) -> str:
    """The option of the sharding group that these settings are."""
    if not isinstance(cfg.sharding, ZeroConfig):
        return "plain"
    return f"zero{cfg.sharding.stage}" + ("_offload" if cfg.sharding.offload_optimizer else "")


def _settings(cfg: TrainConfig | EvalConfig) -> list[str]:
    """What was set that memory depends on."""
    if isinstance(cfg, EvalConfig):
        return [f"eval.batch_tokens={cfg.batch_tokens}"]
    return [
        f"micro_batch_tokens={cfg.micro_batch_tokens}",
        f"max_length={cfg.max_length}",
        f"packing={cfg.packing.value}",
        f"activation_checkpointing={str(cfg.activation_checkpointing).lower()}",
        f"sharding={sharding_name(cfg)}",
        f"nproc={cfg.nproc}",
        f"model.precision={cfg.model.precision.value}",
    ]


def _remedies(cfg: TrainConfig | EvalConfig, place: Place, device: Device, world_size: int) -> list[str]:
    """Settings that lower what filled the memory, the cheapest first."""
    if isinstance(cfg, EvalConfig):
        smaller = [f"eval.batch_tokens={max(1, cfg.batch_tokens // 2)}"] if place.phase != MODEL else []
        return [*smaller, "a device with more memory free, or device=cpu"]
    activations, weights = _of_activations(cfg), _of_weights(cfg, place, device, world_size)
    if place.phase == CHECK:  # its rows are as long as it needs, whatever the micro-batches are
        return [*weights, "check_packing=false"]
    found = weights if place.phase in OF_WEIGHTS else [*activations, *weights]
    if place.phase not in OF_WEIGHTS:
        found.append("a shorter max_length")
    return found or ["a smaller model, or a device with more memory"]


def _of_activations(cfg: TrainConfig) -> list[str]:
    found = []
    if cfg.micro_batch_tokens > cfg.max_length:
        smaller = max(cfg.max_length, cfg.micro_batch_tokens // 2)
        found.append(f"micro_batch_tokens={smaller} (the gradients stay the same)")
    if cfg.packing is Packing.off:
        found.append("packing=auto (no padding)")
    if not cfg.activation_checkpointing:
        found.append("activation_checkpointing=true (a third more time)")
    elif cfg.activation_checkpointing_every > 1:
        found.append("activation_checkpointing_every=1")
    return found


def _of_weights(cfg: TrainConfig, place: Place, device: Device, world_size: int) -> list[str]:
    found = []
    in_fp32 = cfg.model.precision is Precision.fp32 or device.fast_dtypes()[0] == torch.float32
    if in_fp32 and cfg.model.precision is not Precision.bf16 and torch.bfloat16 in device.fast_dtypes():
        found.append("model.precision=bf16 (in a new run)")
    if place.phase == MODEL:
        # The whole model comes to each device before an engine spreads it, so that sharding does not help here.
        return [*found, "free the device of other processes"]
    if device.deepspeed_accelerator is not None:
        found += _of_sharding(cfg, device, world_size)
    if cfg.tuning._target_.endswith("FullTuning"):
        found.append("tuning=lora (in a new run)")
    return found


def _of_sharding(cfg: TrainConfig, device: Device, world_size: int) -> Sequence[str]:
    now, spare = sharding_name(cfg), device.torch_type != "cpu" and device.count() > world_size
    more = f" nproc={device.count()}" if spare else ""
    if now == "plain":
        return [f"sharding=zero3{more}" if world_size > 1 or spare else "sharding=zero2_offload"]
    stage = cfg.sharding.stage if isinstance(cfg.sharding, ZeroConfig) else 0
    found = [f"sharding=zero3{more}"] if (stage < 3 and world_size > 1) or spare else []
    return found if now.endswith("_offload") else [*found, f"sharding={'zero3' if stage == 3 else 'zero2'}_offload"]


def _host_remedies(cfg: TrainConfig | EvalConfig) -> list[str]:
    if isinstance(cfg, TrainConfig) and isinstance(cfg.sharding, ZeroConfig) and cfg.sharding.offload_optimizer:
        return ["a sharding without offload, which keeps optimizer state in host memory", "a smaller nproc"]
    return ["a machine with more memory, or fewer other processes on it", "a smaller nproc"]
