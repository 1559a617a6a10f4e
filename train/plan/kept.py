"""A run's own prediction: made when it starts, kept in plan.json, compared with what was measured when it ends."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError, StorageError, first_line
from configs.files import write_whole
from configs.schema.roots import TrainConfig
from train.data.plan import RowKind
from train.data.prepared import PreparedSplit
from train.devices.base import Device
from train.engine.base import World
from train.loop import Hook, Record
from train.models.load import resolve_precision
from train.run_folder import RunFolder

if TYPE_CHECKING:
    from train.plan.predict import Forecast

logger = logging.getLogger(__name__)

IMAGES_UNKNOWN = "the vision tower's weights are counted, its activations and the pixels of images are not"


@dataclass(frozen=True)
class Foresight:
    """Predicts a run's memory, as it starts.

    Args:
        model_dir: folder of the base model.
        device: of this process.
        world: the processes.
        kind: what rows hold.
        split: what the run trains on.
    """

    model_dir: Path
    device: Device
    world: World
    kind: RowKind
    split: PreparedSplit

    def forecast(self, cfg: TrainConfig) -> Forecast:
        """Of one process.

        Raises:
            Exception: of any kind; a model's own code is called in a way that it may not know.
        """
        from train.plan.model import Model
        from train.plan.predict import Data, Predictor
        from train.plan.process import process_bytes

        on_cpu = self.device.torch_type == "cpu"
        dtype = resolve_precision(cfg.model.precision, self.device, on_note=lambda text: None)
        lengths = self.split.lengths
        return Predictor(
            cfg,
            Model(cfg, self.model_dir, self.device if on_cpu else None),
            dtype=dtype,
            on_cpu=on_cpu,
            kind=self.kind,
            world=self.world.size,
            data=Data(float(self.split.supervised.sum() / lengths.sum()), int(lengths.max())),
            base_bytes=lambda: process_bytes(cfg, dtype),
            row_step=self.device.row_step(dtype),
            fused=self.device.fused_optimizer,
        ).forecast()

    def settle(self, cfg: TrainConfig, note: Callable[[str], None], *, images: bool = False) -> TrainConfig:
        """The config with its `activation_budget` turned into what it comes to; the same on all ranks.

        Raises:
            ConfigError: it cannot be kept.
        """
        from train.plan.budget import budget_bytes, recomputing, within

        if cfg.activation_budget is None:
            return cfg
        every, fault = 0, None
        if self.world.rank == 0:  # ranks would measure their libraries a little differently
            try:
                budget = budget_bytes(cfg, self.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
                chosen, _, why = within(cfg, budget, self.forecast)
                every = chosen.recompute_every
                note(why)
                if images:
                    note(f"activation budget: {IMAGES_UNKNOWN}")
            except ConfigError as error:
                fault = error
            except Exception as error:  # noqa: BLE001  # code of any model and optimizer; the other ranks wait
                found = f"memory cannot be predicted ({type(error).__name__}: {first_line(error)})"
                fault = ConfigError("activation_budget", found, remedy="activation_checkpointing=true")
        told = {"every": every, "fault": fault and {"found": fault.found, "remedy": fault.remedy}}
        told = json.loads(self.world.broadcast_bytes(json.dumps(told).encode()))
        if fault is not None:
            raise fault
        if told["fault"]:
            raise ConfigError("activation_budget", **told["fault"])
        return recomputing(cfg, told["every"])

    def foretell(self, cfg: TrainConfig, run: RunFolder, *, images: bool = False) -> None:
        """Predicts the run's memory and writes plan.json. Whatever goes wrong in it is logged and stops nothing."""
        try:
            run.plan.unlink(missing_ok=True)  # of a run that is resumed, maybe on other devices
            forecast = self.forecast(cfg)
            if images:
                forecast.unknown.append(IMAGES_UNKNOWN)
                logger.info("plan: %s", IMAGES_UNKNOWN)
            write_whole(run.plan, json.dumps(asdict(forecast), indent=2) + "\n")
        except Exception as error:  # a prediction is not worth a run
            logger.warning("plan: no prediction of memory (%s: %s)", type(error).__name__, first_line(error))


class PredictionKept(Hook):
    """Says at the end what was predicted and what it was; plan.json gets both.

    Measured is what `Device.peak_memory_bytes` tells after the last checkpoint: of a CPU the process's largest resident
    set, of an accelerator the most that torch's allocator reserved; both of rank 0.
    """

    def __init__(self, run: RunFolder, device: Device) -> None:
        self.run, self.device = run, device
        self._stepped = False

    def on_step(self, record: Record) -> None:
        """There is something to compare."""
        self._stepped = True

    def on_end(self) -> None:
        """One line."""
        if not self._stepped or not self.run.plan.is_file():
            return
        measured = self.device.peak_memory_bytes() / 2**30
        try:
            plan: dict[str, Any] = json.loads(self.run.plan.read_text(encoding="utf-8"))
            predicted = float(plan["device_bytes"]) / 2**30
            write_whole(self.run.plan, json.dumps(plan | {"measured_peak_gib": measured}, indent=2) + "\n")
        except (OSError, ValueError, KeyError, StorageError) as error:  # what ended the run must be heard, not this
            logger.warning("plan: predicted memory cannot be compared (%s)", first_line(error))
            return
        off = predicted / measured - 1
        logger.info(
            "peak memory: predicted %.2f GiB, measured %.2f GiB (%.0f %% %s)",
            predicted,
            measured,
            abs(off) * 100,
            "too much" if off > 0 else "too little",
        )
