"""`crosstune plan`: predicts memory, disk, communication and time; needs no weights, accelerator or process group."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.compose import build
from configs.errors import ConfigError, ModelError
from configs.schema.dataset import FilesDatasetConfig
from configs.schema.device import AscendConfig
from configs.schema.model import HUB_PREFIX, Precision
from configs.schema.plan import PlanConfig, room
from configs.schema.sharding import ZeroConfig
from launchers.accelerator import choose_accelerator

if TYPE_CHECKING:
    import torch

    from train.devices.base import Device
    from train.plan.model import Model
    from train.plan.predict import Data, Forecast, Predictor

Result = dict[str, Any]
CARD_MIB = 200
"""HCCL_BUFFSIZE where neither config nor environment says another (CANN's default, and crosstune's)."""


@dataclass
class Plan:
    """What all predictions of one call share."""

    cfg: PlanConfig
    device: Device
    on_cpu: bool
    model: Model
    data: Data
    notes: list[str]

    def predictor(self, cfg: PlanConfig, dtype: torch.dtype, world: int) -> Predictor:
        """For this config, which differs from the call's own in how it computes only. What a run notes is noted.

        Raises:
            ConfigError: a run would refuse the config.
        """
        from train.plan.predict import Predictor
        from train.plan.process import process_bytes
        from train.run import row_kind

        return Predictor(
            cfg,
            self.model,
            dtype=dtype,
            on_cpu=self.on_cpu,
            kind=row_kind(cfg, self.model.family, self.note, world),
            world=world,
            data=self.data,
            base_bytes=lambda: process_bytes(cfg, dtype),
            row_step=self.device.row_step(dtype) if self.on_cpu else 1,
            fused=self.device.fused_optimizer,
        )

    def settle(self) -> PlanConfig:
        """From here on the config has what its `activation_budget` comes to.

        Raises:
            ConfigError: it cannot be kept, or is `auto` and the device is not here.
        """
        from train.plan.budget import budget_bytes, within

        if self.cfg.activation_budget == "auto" and not self.on_cpu and self.device.torch_type == "cpu":
            raise ConfigError("activation_budget", "auto, but no device is here to ask", allowed="an amount: 48GiB")
        budget = budget_bytes(self.cfg, self.device, self.on_a_machine)
        self.cfg, _, why = within(self.cfg, budget, lambda cfg: self.predictor(cfg, self.dtype, self.world).forecast())
        self.note(why)
        return self.cfg

    def note(self, text: str) -> None:
        """For the user, told once."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def world(self) -> int:
        """Processes: as many as `fit` names, else as the config says."""
        named = room(self.cfg.fit)[1] if self.cfg.fit else None
        return named or self.cfg.nproc * self.cfg.plan.nodes

    @property
    def on_a_machine(self) -> int:
        """Processes of one machine: `nproc`; where that is left at 1, those that `fit` names, over `plan.nodes`."""
        if self.cfg.nproc == 1:
            return math.ceil(self.world / self.cfg.plan.nodes)
        return min(self.cfg.nproc, self.world)

    def on_host(self, forecast: Forecast) -> int:
        """Bytes of host memory that one machine needs; a file that several processes map counts for each."""
        return self.on_a_machine * (forecast.device_bytes if self.on_cpu else forecast.host_bytes)

    @property
    def dtype(self) -> torch.dtype:
        """Of the working weights."""
        from train.devices.base import DTYPES

        if self.cfg.model.precision is not Precision.auto:
            return DTYPES[self.cfg.model.precision]
        if self.on_cpu:
            return self.device.fast_dtypes()[0]
        return DTYPES[Precision.bf16]

    def beside(self, cfg: PlanConfig) -> dict[str, int]:
        """Device memory that torch's allocator does not count, by what takes it."""
        if self.on_cpu:
            return {}
        found = {"reserve for context and libraries": int(cfg.plan.reserve_gib * 2**30)}
        if isinstance(cfg.device, AscendConfig) and self.world > 1:
            mib = cfg.device.buffer_mib or int(os.environ.get("HCCL_BUFFSIZE", CARD_MIB))
            # One communicator for the run, and a second one that DeepSpeed makes; each takes its buffer twice.
            communicators = 2 if isinstance(cfg.sharding, ZeroConfig) else 1
            found["collective library, two buffers a communicator"] = 2 * communicators * mib * 2**20
        return found


def plan(cfg: PlanConfig) -> Result:
    """Prints the plan.

    Returns:
        All of it, for ``--json``; sizes in bytes.

    Raises:
        ModelError: there is no config.json, or transformers cannot build the model.
        ConfigError: the tuning method, the objective or the packing does not fit the model.
        DataError: the data were prepared by another version.
    """
    from rich.console import Console

    from launchers.doctor.page import Page
    from launchers.plan.fit import settings_that_fit
    from launchers.plan.page import show

    started = time.monotonic()
    made = _made(cfg)
    if cfg.activation_budget is not None:
        cfg = made.settle()
    predictor = made.predictor(cfg, made.dtype, made.world)
    forecast = predictor.forecast()
    result: Result = {
        "model": str(made.model.model_dir),
        "family": made.model.family.model_type,
        "parameters": sum(weight.numel for weight in predictor.weights),
        "trained": predictor.trained_numel,
        "device": made.device.name,
        "on_cpu": made.on_cpu,
        "precision": str(made.dtype).removeprefix("torch."),
        "processes": made.world,
        "micro_batch": {"tokens": predictor.shape.tokens, "supervised": predictor.shape.supervised},
        "passes_per_step": predictor.passes,
        **asdict(forecast),
        "beside_bytes": made.beside(cfg),
        "per_machine": {"processes": made.on_a_machine, "host_bytes": made.on_host(forecast)},
        "checkpoints_kept": _kept(cfg),
        "speed": _speed(made, forecast),
        "fits": settings_that_fit(made) if cfg.fit else None,
        "notes": made.notes,
        "seconds": round(time.monotonic() - started, 2),
    }
    show(result, cfg, Page(Console()))
    return result


def _made(cfg: PlanConfig) -> Plan:
    choose_accelerator("cpu")
    # What a run imports, so that this process's own resident set tells that of one.
    import peft  # noqa: F401

    import train.run  # noqa: F401
    from train.devices.base import Device
    from train.objectives.base import Objective
    from train.plan.model import Model

    notes: list[str] = []
    device = build(cfg.device, Device)
    on_cpu = device.torch_type == "cpu"
    if on_cpu and cfg.fit and cfg.device._target_.endswith("AutoDevice"):
        on_cpu = False
        notes.append("device=auto found no accelerator here; planned for one, as fit=... names its memory")
    if not on_cpu and cfg.model.precision is Precision.auto:
        notes.append("model.precision=auto is taken for bf16; model.precision=fp32 plans for a device without it")
    folder = _model_folder(cfg, notes)
    model = Model(cfg, folder, device if on_cpu else None)
    build(cfg.objective, Objective).check(model.config, notes.append)
    made = Plan(cfg, device, on_cpu, model, _data(cfg, notes), notes)
    if (each := made.on_a_machine) > cfg.nproc:
        where = "one machine" if cfg.plan.nodes == 1 else f"{cfg.plan.nodes} machines, {each} on each"
        notes.append(
            f"the {made.world} processes of fit are taken to be on {where}: nproc=..., the processes of a machine, or "
            "plan.nodes=... says otherwise"
        )
    return made


def _model_folder(cfg: PlanConfig, notes: list[str]) -> Path:
    """A folder with config.json; weights and tokenizer need not be there."""
    from train.models.load import ensure_model, whole_weights

    folder, cache_dir = Path(cfg.model.path).expanduser(), Path(cfg.cache_dir).expanduser()
    if cfg.model.gguf_package or cfg.model.path.startswith(HUB_PREFIX):
        return ensure_model(cfg.model, cache_dir, on_note=notes.append, write=False)
    if not (folder / "config.json").is_file():
        raise ModelError(
            "model.path",
            f"no config.json in '{cfg.model.path}'",
            allowed="a folder with config.json; a plan needs no weights",
            remedy="check the path",
        )
    if not any(folder.glob("*.safetensors")):
        return folder
    try:
        return whole_weights(folder, cfg.model, cache_dir, on_note=notes.append, write=False)
    except ModelError as error:
        notes.append(f"the weights were not looked at: {error.where}: {error.found}")
        return folder


def _data(cfg: PlanConfig, notes: list[str]) -> Data:
    """What is known of the data: of prepared ones what their manifest says, of others nothing.

    Raises:
        DataError: they were prepared by another version.
    """
    from data_prep.manifest import is_prepared
    from train.data.prepared import PreparedData
    from train.plan.predict import Data

    share, longest = cfg.plan.supervised_share, None
    # As a run tells them apart: any other folder holds raw records.
    if isinstance(cfg.dataset, FilesDatasetConfig) and is_prepared(folder := Path(cfg.dataset.path).expanduser()):
        split = PreparedData.open(folder).manifest["splits"].get("train", {})
        longest = split.get("max_length")
        if not share and split.get("tokens"):
            share = split["supervised_tokens"] / split["tokens"]
    elif not share:
        notes.append("all tokens count as supervised, the most that can be; plan.supervised_share=... says otherwise")
    return Data(share or 1.0, longest)


def _kept(cfg: PlanConfig) -> int | None:
    """Checkpoints on the disk at once; None where all stay."""
    keep = cfg.checkpoint
    if not keep.keep_last or keep.keep_every:
        return None
    return keep.keep_last + keep.keep_best + 1


def _speed(made: Plan, forecast: Forecast) -> Result:
    """Time of a step from FLOP/s, or why it is not known."""
    if forecast.flops_per_token is None:
        return {"unknown": "this model has weights that the count of FLOPs does not cover (train/observe/flops.py)"}
    options = made.cfg.plan
    if options.measure:
        reached, source = _measured_flops(made), "a matrix product timed here"
    elif options.flops:
        reached, source = options.flops, "plan.flops"
    else:
        peak = _peak(made)
        if peak is None:
            return {
                "unknown": "no peak is known for this device: plan.flops=... (FLOP/s reached), device.peak_tflops=... "
                "or plan.measure=true"
            }
        reached, source = peak * options.mfu, f"{options.mfu:.0%} of the peak, assumed (plan.mfu)"
    more = 4 / 3 if made.cfg.activation_checkpointing else 1.0
    tokens_per_second = reached * made.world / (forecast.flops_per_token * more)
    return {
        "flops": reached,
        "from": source,
        "tokens_per_second": tokens_per_second,
        "step_seconds": forecast.tokens_per_step / tokens_per_second,
    }


def _peak(made: Plan) -> float | None:
    if made.cfg.device.peak_tflops:
        return made.cfg.device.peak_tflops * 1e12
    if made.on_cpu or not made.device.availability().ok:
        return None
    return made.device.peak_flops(made.dtype)


def _measured_flops(made: Plan) -> float:
    """FLOP/s of a square matrix product in the working format on this machine's device."""
    import torch

    if not made.on_cpu:
        made.device.require()
        made.device.activate(0)
    size, best = 1024 if made.on_cpu else 8192, float("inf")
    left = torch.ones(size, size, dtype=made.dtype, device=made.device.torch_device)
    for _ in range(4):
        started = time.perf_counter()
        left @ left
        made.device.synchronize()
        best = min(best, time.perf_counter() - started)
    if not best:
        raise ConfigError("plan.measure", "the clock did not advance", remedy="plan.flops=...")
    return 2 * size**3 / best
