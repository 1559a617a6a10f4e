"""What an engine is: it holds the trained weights and their optimizer state, and turns losses into steps.

The step loop and the checkpoint know only what stands here. Names, shapes and state are those of the whole model,
however an engine spreads them: a `Fragment` says which piece of which parameter lies where.

Not covered here: tensor and pipeline parallelism; fp16 (its loss scaling makes the step sequence depend on luck).
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import nn

from configs.errors import CheckpointError
from configs.schema.optim import OptimConfig
from configs.schema.sharding import ShardingConfig
from train.devices.base import Device
from train.engine.needs import ModelNeeds

COLLECTIVE_TIMEOUT_SECONDS = 1800.0
"""After so long without an answer from its peers a rank gives up, at the least."""

MASTER = "master"
"""The kind of tensor that the optimizer steps: the fp32 weight."""


@dataclass(frozen=True)
class World:
    """The processes that train together, as seen by one of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine."""
    control: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    """Group for host tensors; None where the default group serves."""
    background: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    """Such a group for another thread than that of the steps; None at size 1."""
    timeout: timedelta | None = field(default=None, repr=False, compare=False)
    """Of the collectives; None at size 1."""

    @property
    def leads_node(self) -> bool:
        """Whether this rank acts for all of its machine."""
        return self.local_rank == 0

    def in_background(self) -> World:
        """The same processes for the thread that writes checkpoints: collectives of two threads must not mix."""
        return replace(self, control=self.background)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks in fp64, the same bits on each; `values` themselves at size 1."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return [float(value) for value in total.tolist()]

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """What every rank gave, by rank; all of it is on each rank."""
        if self.size == 1:
            return [data]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self.control)
        longest = max(1, *(int(length) for length in lengths))
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8)
        dist.all_gather(parts, padded, group=self.control)
        return [part.numpy().tobytes()[: int(length)] for part, length in zip(parts, lengths, strict=True)]

    def broadcast_bytes(self, data: bytes, source: int = 0) -> bytes:
        """What rank `source` gave, on every rank; what the others give is not looked at."""
        if self.size == 1:
            return data
        length = torch.tensor([len(data)])
        dist.broadcast(length, src=source, group=self.control)
        mine = data if self.rank == source else bytes(int(length))
        if not mine:
            return b""
        buffer = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        dist.broadcast(buffer, src=source, group=self.control)
        return buffer.numpy().tobytes()

    def send(self, data: torch.Tensor, to: int) -> None:
        """Gives a host tensor to rank `to`, which must `receive` one of that shape and type; waits until it is gone."""
        dist.send(data, dst=to, group=self.control)

    def receive(self, buffer: torch.Tensor, source: int) -> None:
        """Waits for what rank `source` sends to this one and fills `buffer`, a host tensor, with it."""
        dist.recv(buffer, src=source, group=self.control)

    def adopt_groups(self) -> None:
        """Gives groups that a library has made the time-out of ours.

        A default may be a third of it, and would end a run before the watch over hangs can say who is late.
        """
        if self.timeout is None:
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Set timeout is now only supported")  # other backends have none
            for group in list(dist.distributed_c10d._world.pg_map):
                dist.distributed_c10d._set_pg_timeout(self.timeout, group)

    def close(self) -> None:
        """Leaves the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()


def init_world(device: Device, timeout_seconds: float = COLLECTIVE_TIMEOUT_SECONDS) -> World:
    """Joins the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK); alone where they are unset.

    After `timeout_seconds` without an answer from its peers a rank gives up.

    Host values travel over gloo in a group of their own where the device has another backend: that backend may
    know neither host tensors nor fp64.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if size == 1:
        return World(local_rank=local_rank)
    timeout = timedelta(seconds=timeout_seconds)
    # Torch would have the group bound to a device. A gloo group beside a bound one exists for few devices only, and
    # each group that is made from a bound one connects at once and takes its buffers, used or not. There is nothing
    # to guess either: the current device is the one that `Device.activate` has set.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    if not dist.is_initialized():
        dist.init_process_group(device.backend, timeout=timeout)
    control = None if device.backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    background = dist.new_group(backend="gloo", timeout=timeout)
    return World(dist.get_rank(), size, local_rank, control, background, timeout)


class Scalar(TypedDict):
    """One number of an optimizer's state, such as Adam's step count."""

    value: float
    tensor: bool
    """Whether the optimizer keeps it as a 0-d tensor."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one trained parameter, and of its optimizer state, that this rank holds."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    offset: int
    """Where the piece begins in the flattened parameter, in elements."""
    numel: int
    flat: torch.Tensor
    """The fp32 tensor that the optimizer steps; it may hold pieces of several parameters."""
    at: int
    """Where the piece begins in `flat`, in elements."""
    optimizer: torch.optim.Optimizer

    def view(self, kind: str) -> torch.Tensor:
        """The live values [numel] of one kind: ``master`` or a state tensor's name."""
        whole = self.flat if kind == MASTER else self._state[kind]
        return whole.detach().view(-1).narrow(0, self.at, self.numel)

    @property
    def kinds(self) -> list[str]:
        """``master``, and the state tensors that exist (none before the first step).

        Raises:
            CheckpointError: the optimizer keeps something that is neither a number nor fp32 per element.
        """
        kinds = [MASTER]
        for key, value in self._state.items():
            if self._is_scalar(key):
                continue
            if not torch.is_tensor(value) or value.shape != self.flat.shape or value.dtype != torch.float32:
                what = f"{tuple(value.shape)} {value.dtype}" if torch.is_tensor(value) else type(value).__name__
                raise CheckpointError(
                    "optim._target_",
                    f"{type(self.optimizer).__name__} keeps '{key}' as {what}, which has no place in a checkpoint",
                    allowed="optimizers whose state is numbers and one fp32 value per element, such as AdamW or SGD",
                )
            kinds.append(key)
        return kinds

    @property
    def scalars(self) -> dict[str, Scalar]:
        """The numbers of the optimizer's state."""
        return {
            key: Scalar(value=float(value), tensor=torch.is_tensor(value))
            for key, value in self._state.items()
            if self._is_scalar(key)
        }

    def make_state(self, kinds: Sequence[str], scalars: Mapping[str, Scalar]) -> None:
        """Gives the optimizer exactly this state, its tensors to be filled through `view`."""
        state = self.optimizer.state[self.flat]
        wanted = {kind for kind in kinds if kind != MASTER}
        for key in set(state) - wanted:
            del state[key]
        for key in sorted(wanted - set(state)):
            state[key] = torch.zeros_like(self.flat, requires_grad=False)
        # torch keeps counters on the host, save where a fused or capturable kernel reads them.
        on_device = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        place = self.flat.device if on_device else torch.device("cpu")
        for key, scalar in scalars.items():
            value = scalar["value"]
            state[key] = torch.tensor(value, dtype=torch.float32, device=place) if scalar["tensor"] else value

    @property
    def _state(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self.optimizer.state.get(self.flat, {})
        return state

    def _is_scalar(self, key: str) -> bool:
        value = self._state[key]
        if torch.is_tensor(value):
            return key == "step" or (value.dim() == 0 and self.flat.dim() > 0)
        return isinstance(value, (int, float))


def fragments_of_whole(
    masters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, world: World
) -> list[Fragment]:
    """Of parameters that every rank of `world` holds: rank r answers for the r-th part of each."""
    found = []
    for name, master in masters.items():
        begin, end = (master.numel() * rank // world.size for rank in (world.rank, world.rank + 1))
        if end > begin:
            found.append(Fragment(name, tuple(master.shape), begin, end - begin, master, begin, optimizer))
    return found


class Engine(ABC):
    """Weights in `working_dtype` for the forward pass; masters and optimizer state in fp32.

    Trained parameters are those that require gradients. Every rank calls `forward` and `backward` equally often per
    step, since some engines communicate in both.

    Args:
        config: the sharding group.
        module: the model, equal on all ranks; it is moved to the device and cast in place.
        optim: the optim group.
        device: activated.
        world: from `init_world`.
        working_dtype: of the parameters, fp32 or bf16. Buffers keep theirs.
        needs: what the model asks for.
    """

    def __init__(
        self,
        config: ShardingConfig,
        module: nn.Module,
        *,
        optim: OptimConfig,
        device: Device,
        world: World,
        working_dtype: torch.dtype,
        needs: ModelNeeds = ModelNeeds(),  # noqa: B008  # immutable
    ) -> None:
        assert working_dtype in (torch.float32, torch.bfloat16), working_dtype
        self.config, self.module, self.optim = config, module, optim
        self.device, self.world, self.working_dtype = device, world, working_dtype
        for name, parameter in module.named_parameters():
            dtype = torch.float32 if name in needs.fp32 else working_dtype
            parameter.data = parameter.data.to(device.torch_device, dtype).contiguous()
        module.to(device.torch_device)
        self.trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        """By name; a tied parameter once."""
        assert self.trained, "no parameter requires gradients"

    kernels: tuple[str, ...] = ()
    """Ops of `train/ops` that the model runs by the device's own version; for the records."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All parameters, trained or frozen, by name; one that is spread over the ranks may be empty on this one."""
        yield from self.module.named_parameters()

    @abstractmethod
    def forward(self, **batch: Any) -> Any:
        """Calls the model with `batch` as it is; returns the model's output."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradients of `loss` to those of the step.

        Args:
            loss: scalar whose gradients, summed over ranks and micro-batches, are the wanted gradient.
            last: this is the last micro-batch of the global step.
        """

    @abstractmethod
    def step(self, lr: float) -> float:
        """Clips to ``optim.max_grad_norm``, steps the masters, refreshes the working weights, drops the gradients.

        Returns:
            L2 norm of the gradient over all parameters before clipping. If it is not finite (inf or nan), nothing
            was stepped and weights and optimizer state are as before, on every rank.
        """

    @abstractmethod
    def fragments(self, owned: bool) -> list[Fragment]:
        """The pieces on this rank.

        Args:
            owned: only those that this rank answers for: over all ranks they cover every parameter exactly once.
                Else all that it holds.
        """

    @abstractmethod
    def prepare_restore(self) -> None:
        """Before the masters are overwritten through the fragments. Called on all ranks."""

    @abstractmethod
    def finish_restore(self, step: int) -> None:
        """After the masters are overwritten: brings the working weights up to date. Called on all ranks.

        Args:
            step: global steps done.
        """

    def close(self) -> None:  # noqa: B027  # most engines hold nothing that the garbage collector does not see
        """Lets go of hooks and buffers; the module stays usable where it is whole on this rank."""
