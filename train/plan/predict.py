"""What one process of a run will need, from its config and the model's config.json alone.

The model is built on the meta device and one micro-batch is traced (`trace`), the engine's own allocations are written
around it (`engines`), and an allocator says what it would hold for all that (`allocators`). So the prediction follows
the code that runs; nothing in it is fitted to a case.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from configs.errors import ConfigError, first_line
from configs.schema.outputs import SaveMode
from configs.schema.roots import TrainConfig
from configs.schema.sharding import ZeroConfig
from train.data.plan import RowKind
from train.data.sampler import fill_step
from train.engine.needs import needs_of
from train.engine.optimizer import build_optimizer, has_fused, is_torchs
from train.engine.zero_config import deepspeed_config
from train.observe.flops import flops_per_token
from train.plan.allocators import caching_peak, host_peak
from train.plan.engines import FP32, Setting, Weight, Zero
from train.plan.gathering import part_of
from train.plan.model import Model
from train.plan.process import Files
from train.plan.tape import COPY, Tape
from train.plan.trace import Event, Pass, Shape, fullest, trace_optimizer
from train.plan.traffic import sent_bytes
from train.plan.zero_engines import script_of

STEPS = 3
"""So many steps are written down: in the first one the optimizer's state comes, later ones find the holes it left."""
PASSES = 2
"""So many micro-batches of a step are written down: a later one is like the second."""
BASE, HELD, LOADING = "process: Python and libraries", "held by the allocator in holes", "loading the weights"
MAPPED = "file pages of weights that loading joined"


@dataclass(frozen=True)
class Data:
    """What is known of the data."""

    supervised_share: float = 1.0
    """Of the tokens; 1: the most that can be."""
    longest: int | None = None
    """Tokens of the longest sample; None: `max_length`."""


@dataclass
class Forecast:
    """Memory of one process; all figures in bytes."""

    device_bytes: int
    """The most that torch holds on the device; for a CPU the resident set."""
    parts: dict[str, int]
    """What it is made of."""
    host_bytes: int
    """Further memory on the host: an accelerator's process, offloaded state, a checkpoint's copy. A CPU's: 0."""
    host_parts: dict[str, int]
    checkpoint_bytes: int
    """Of a whole checkpoint, all ranks together."""
    sent_bytes: dict[str, int]
    """What a rank sends in a step."""
    flops_per_token: float | None
    tokens_per_step: int
    unknown: list[str] = field(default_factory=list)
    """What is estimated, and how, or not counted."""


ESTIMATED = "activations:"
"""What `Forecast.unknown` says of a model that could not be traced begins so."""


class Predictor:
    """Predicts for one config; `Model` may be shared by several that differ in how they compute only.

    Args:
        cfg: of the run.
        model: as the config says.
        dtype: of the working weights.
        on_cpu: whether the device is the host itself.
        kind: what rows hold.
        world: processes.
        data: what is known of it.
        base_bytes: tells the resident set of a process before it loads the model; asked once the model is traced.
        row_step: the device's.
        fused: the device's `fused_optimizer`.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        model: Model,
        *,
        dtype: torch.dtype,
        on_cpu: bool,
        kind: RowKind,
        world: int,
        data: Data,
        base_bytes: Callable[[], int],
        row_step: int = 1,
        fused: bool = False,
    ) -> None:
        self.cfg, self.model, self.dtype, self.on_cpu = cfg, model, dtype, on_cpu
        self.row_step, self.fused = row_step, fused and has_fused(cfg.optim)
        self.kind, self.world, self.data, self._base = kind, world, data, base_bytes
        self.module = model.module(dtype, packed=kind is RowKind.packed, recompute=cfg.recompute_every)
        self.needs = needs_of(self.module)
        self.unknown: list[str] = []

    def forecast(self) -> Forecast:
        """All of it."""
        setting = self._setting()
        self.base = self._base()
        script_of(setting).write(min(self.passes, PASSES), STEPS)
        peak, parts, host_parts = self._device(setting)
        return Forecast(
            device_bytes=peak,
            parts=dict(parts),
            host_bytes=sum(host_parts.values()),
            host_parts=host_parts,
            checkpoint_bytes=self._state_bytes,
            sent_bytes=self.sent(),
            flops_per_token=flops_per_token(
                self.module, length=self.longest, supervised_share=self.data.supervised_share
            ),
            tokens_per_step=min(self.cfg.batch_tokens, self.passes * self.world * self.shape.tokens),
            unknown=self.unknown,
        )

    def _device(self, setting: Setting) -> tuple[int, Counter[str], dict[str, int]]:
        """Peak, its parts, and the host's parts."""
        live, parts = setting.device.peak()
        files = Files(self.model.model_dir, self.model.shapes, self.dtype)
        whole = sum(setting.bytes_of(weight) for weight in self.weights)
        loading = whole + files.bytes - files.mapped
        if not self.on_cpu:
            held = caching_peak(setting.device.events)
            parts[HELD] = held - live
            copied = setting.host.peak()[1]
            return held, parts, {BASE: self.base, LOADING: loading, **copied}
        # A checkpoint's copy comes in blocks larger than any hole that some small object does not cut.
        tape = setting.device
        of_copy = sum(max(0, size) for number, size in tape.events if tape.parts[number] == COPY)
        rest = [event for event in tape.events if tape.parts[event[0]] != COPY]
        held = host_peak(rest, tape.objects) or 0
        if held:
            held += of_copy
        else:
            self.unknown.append("holes in the host's memory: no glibc here to ask, so none are counted")
        parts[HELD], parts[BASE] = max(0, held - live), self.base
        parts[MAPPED] = files.beside if self._keeps_its_weights else 0
        trained = parts.total()
        if loading + self.base > trained:
            return loading + self.base, Counter({BASE: self.base, LOADING: loading}), {}
        return trained, parts, {}

    @property
    def _keeps_its_weights(self) -> bool:
        """Whether some stay where loading put them; ZeRO moves those it spreads."""
        if self.zero is None:
            return True
        return self.zero.stage < 3 and not all(weight.trained for weight in self.weights)

    @cached_property
    def weights(self) -> list[Weight]:
        """The module's parameters."""
        return [
            Weight(name, parameter.shape, parameter.requires_grad, name in self.needs.fp32)
            for name, parameter in self.module.named_parameters()
        ]

    @property
    def trained_numel(self) -> int:
        """Elements that train."""
        return sum(weight.numel for weight in self.weights if weight.trained)

    @property
    def spread_numel(self) -> int:
        """Elements that train and are spread where ZeRO spreads."""
        return sum(weight.numel for weight in self.weights if weight.trained and not weight.fp32)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return min(self.cfg.max_length, self.data.longest or self.cfg.max_length)

    @cached_property
    def shape(self) -> Shape:
        """The micro-batch that takes the most."""
        # A rank is dealt its share of the step, give or take a sample, and fills its micro-batches with that.
        dealt = max(self.longest, math.ceil(self.cfg.batch_tokens / self.world))
        tokens = min(self.cfg.micro_batch_tokens, dealt)
        if self.kind is RowKind.packed and not self.model.family.packed_mixers:
            step = fill_step(
                self.row_step,
                self.longest,
                batch_tokens=self.cfg.batch_tokens,
                world_size=self.world,
                micro_batch_tokens=self.cfg.micro_batch_tokens,
            )
            tokens = min(self.cfg.micro_batch_tokens, math.ceil(tokens / step) * step)
        return fullest(self.kind, tokens, min(self.longest, tokens), self.data.supervised_share)

    @property
    def passes(self) -> int:
        """Micro-batches of a rank in a step."""
        return max(1, math.ceil(self.cfg.batch_tokens / self.world / self.shape.tokens))

    @property
    def _state_bytes(self) -> int:
        """Masters and state of all trained weights, in fp32."""
        stay = self.optimizer_events((torch.Size((1024,)),))[0]
        freed = {number for number, size in stay if size < 0}
        states = sum(1 for number, size in stay if number not in freed and size >= 1024 * FP32)
        return FP32 * (1 + states) * self.trained_numel

    def optimizer_events(self, shapes: Sequence[torch.Size]) -> tuple[list[Event], list[Event]]:
        """First and later steps of the run's optimizer over tensors of these shapes."""
        key = (tuple(shapes), self.on_cpu)
        if key not in self.model.optimizers:
            self.model.optimizers[key] = self._traced_optimizer(shapes)
        return self.model.optimizers[key]

    def _traced_optimizer(self, shapes: Sequence[torch.Size]) -> tuple[list[Event], list[Event]]:
        said = "it may talk to other ranks"
        if self.world == 1 or is_torchs(self.cfg.optim):
            try:
                return trace_optimizer(
                    lambda named: build_optimizer(self.cfg.optim, named),
                    shapes,
                    foreach=not self.on_cpu and not self.fused,
                    fused=self.fused,
                )
            except ConfigError:
                raise
            except Exception as error:  # noqa: BLE001  # anybody's code, that may read numbers where there are none
                said = first_line(error) or type(error).__name__
        guess = f"optimizer: {self.cfg.optim._target_} is not traced ({said}); two numbers in fp32 a weight are counted"
        if guess not in self.unknown:
            self.unknown.append(guess)
        return [(number, FP32 * shape.numel()) for number, shape in enumerate([*shapes, *shapes])], []

    def _setting(self) -> Setting:
        device, keep = Tape(), self.cfg.checkpoint
        # With every=0 a run waits for its one save (`train.checkpoint.checkpointer`).
        copies = keep.mode is SaveMode.asynchronous or (keep.mode is SaveMode.auto and keep.every > 0)
        if self.zero is not None and not self.spread_numel:
            raise ConfigError(
                "sharding",
                f"stage {self.zero.stage}, but all that trains is kept in fp32 on every rank: nothing is left to shard",
                remedy="sharding=plain, or train more parts",
            )
        return Setting(
            weights=self.weights,
            modules=part_of(self.module, self.needs.as_one, self.needs.fp32),
            size=self.dtype.itemsize,
            world=self.world,
            zero=self.zero,
            step=self.optimizer_events,
            micro_batch=self._micro_batch(),
            reserve_buckets=not self.on_cpu,
            gather_buffers=2 if self.on_cpu else 1,
            device=device,
            host=device if self.on_cpu else Tape(),
            copy=self._state_bytes // self.world if copies else 0,
            copy_stays=copies and 0 < keep.every and not 0 < self.cfg.max_steps <= keep.every,
        )

    def _micro_batch(self) -> Pass:
        try:
            return self.model.traced(self.dtype, self.shape, recompute=self.cfg.recompute_every)
        except Exception as error:  # whatever a layer raises that reads numbers where there are none
            if type(error).__name__ == "ConfigError":
                raise
            said = first_line(error) or type(error).__name__
            self.unknown.append(
                f"{ESTIMATED} a layer of '{self.model.family.model_type}' cannot be traced without numbers ({said}); "
                "estimated as 34 bytes for each token, layer and hidden unit in bf16, twice that in fp32 "
                "(Korthikanti et al. 2022, arXiv:2205.05198, without the attention scores)"
            )
            return self._estimated()

    def _estimated(self) -> Pass:
        config = self.model.config.get_text_config()
        factor = 34 * self.dtype.itemsize // 2
        every = self.cfg.recompute_every
        again = len(range(0, config.num_hidden_layers, every)) if every else 0
        layers = config.num_hidden_layers - again + (again > 0)
        kept = self.dtype.itemsize * again
        hidden = self.shape.tokens * config.hidden_size
        logits = self.shape.supervised * self.model.vocabulary * (self.dtype.itemsize + 3 * FP32)
        events = [(0, hidden * (factor * layers + kept)), (1, logits), (1, -1), (0, -1)]
        return Pass(events, 2, [], {1})

    @cached_property
    def zero(self) -> Zero | None:
        """DeepSpeed's settings as the run would give them."""
        sharding = self.cfg.sharding
        if not isinstance(sharding, ZeroConfig):
            return None
        numel = sum(weight.numel for weight in self.weights)
        settings = deepspeed_config(
            sharding,
            world_size=self.world,
            precision="bf16" if self.dtype == torch.bfloat16 else "fp32",
            max_grad_norm=self.cfg.optim.max_grad_norm,
            model_numel=numel,
        )["zero_optimization"]
        stage = sharding.stage
        return Zero(
            stage=stage,
            offload=sharding.offload_optimizer,
            bucket=int(settings["reduce_bucket_size"]),
            overlap=bool(settings.get("overlap_comm", stage == 3)),
            prefetch=int(settings.get("stage3_prefetch_bucket_size", Zero.prefetch)),
            persistent=int(settings.get("stage3_param_persistence_threshold", Zero.persistent)),
            max_live=int(settings.get("stage3_max_live_parameters", Zero.max_live)),
            reuse=int(settings.get("stage3_max_reuse_distance", 0)),
            sub_group=int(settings.get("sub_group_size", Zero.sub_group)),
        )

    def sent(self) -> dict[str, int]:
        """Bytes that a rank sends in a step."""
        stage = self.zero.stage if self.zero else 0
        return sent_bytes(self.weights, self.dtype.itemsize, stage=stage, world=self.world, passes=self.passes)
