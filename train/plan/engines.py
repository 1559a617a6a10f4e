"""A run's allocations on one rank, engine by engine: what they are made from, and the plain engine's.

Sizes are those of rank 0, whose share is never smaller than another's. What is kept in host memory goes on the host's
tape, which for a CPU is the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from train.checkpoint.snapshot import CHUNK
from train.engine.reduce import BUCKET_NUMEL
from train.plan import tape as part
from train.plan.gathering import Part
from train.plan.tape import Tape
from train.plan.trace import Event, Pass

FP32 = 4


@dataclass(frozen=True)
class Weight:
    """One parameter."""

    name: str
    shape: torch.Size
    trained: bool
    fp32: bool = False
    """Kept in fp32 among weights that are not: a master of its own, and under ZeRO whole on every rank."""

    @property
    def numel(self) -> int:
        """Elements."""
        return self.shape.numel()


@dataclass(frozen=True)
class Zero:
    """What of DeepSpeed's settings decides about memory; defaults as in `train.engine.zero_config`."""

    stage: int
    offload: bool = False
    bucket: int = 50_000_000
    """Elements that are reduced at a time."""
    overlap: bool = False
    prefetch: int = 50_000_000
    persistent: int = 100_000
    """Parameters of so few elements stay gathered."""
    max_live: int = 1_000_000_000
    reuse: int = 0
    """Elements within which a further use keeps a weight gathered."""
    sub_group: int = 1_000_000_000


@dataclass
class Setting:
    """What a script of a run is made from."""

    weights: Sequence[Weight]
    size: int
    """Bytes of a working weight."""
    world: int
    zero: Zero | None
    """None: the plain engine."""
    step: Callable[[Sequence[torch.Size]], tuple[list[Event], list[Event]]]
    """Traces the optimizer over tensors of these shapes."""
    micro_batch: Pass
    reserve_buckets: bool
    """Buffers count whole, as an accelerator's allocator takes them; else only as far as they are written to."""
    gather_buffers: int = 1
    """Buffers as large as what ZeRO-3 gathers: that of the all-gather, and over gloo a copy of it (seen: 123 MiB
    more than the 122 MiB that were gathered)."""
    modules: Part = Part()
    """In which ZeRO-3 gathers the weights."""
    copy: int = 0
    """Bytes of the copy that an asynchronous save keeps on the host; 0: none."""
    copy_stays: bool = False
    """Steps follow a save, which keeps its copy for the next; else there is one at the end only."""
    device: Tape = field(default_factory=Tape)
    host: Tape = field(default_factory=Tape)

    @property
    def trained(self) -> list[Weight]:
        """Those that train."""
        return [weight for weight in self.weights if weight.trained]

    def bytes_of(self, weight: Weight) -> int:
        """Of the whole weight, as the model computes with it."""
        return (FP32 if weight.fp32 else self.size) * weight.numel

    @property
    def spread(self) -> list[Weight]:
        """Those of them that ZeRO spreads."""
        return [weight for weight in self.trained if not weight.fp32]

    @property
    def groups(self) -> list[list[Weight]]:
        """Of these, as `train.engine.optimizer` groups them: matrices and the rest."""
        matrices = [weight for weight in self.spread if len(weight.shape) >= 2]
        others = [weight for weight in self.spread if len(weight.shape) < 2]
        return [group for group in (matrices, others) if group]


class Script:
    """Writes a run onto the tapes. The engines differ in what they do around the passes."""

    def __init__(self, setting: Setting) -> None:
        self.set = setting
        self.device, self.host = setting.device, setting.host
        self._stepped = False

    def write(self, passes: int, steps: int) -> None:
        """So many steps of so many micro-batches each."""
        self.build()
        for taken in range(steps):
            if taken == steps - 1 and self.set.copy_stays:
                self._copy()
            for number in range(passes):
                self.begin_pass()
                graph = self._pass()
                self.end_pass(last=number == passes - 1)
                self.device.give(*graph)
            self.step()
            self._stepped = True
        if not self.set.copy_stays:
            self._copy()

    def build(self) -> None:
        """Model and engine."""
        raise NotImplementedError

    def begin_pass(self) -> None:
        """Before a forward pass."""

    def end_pass(self, last: bool) -> None:
        """After a backward pass."""

    def step(self) -> None:
        """The optimizer's."""
        raise NotImplementedError

    def _copy(self) -> None:
        for at in range(0, self.set.copy, CHUNK):
            self.host.take(part.COPY, min(CHUNK, self.set.copy - at))

    def learned(self, numel: int) -> None:
        """A gradient in the working dtype is there, and gone where the engine keeps nothing of it."""

    def _pass(self) -> list[int]:
        """Forward and backward; returns the numbers of what goes with the loss."""
        each, on_host = self.set.micro_batch, self.device is self.host
        parts = [part.LOGITS if number in each.wide else part.ACTIVATIONS for number in range(each.tensors)]
        for number in each.graph:
            parts[number] = part.GRAPH
        at, left = 0, dict[int, int]()
        for place, numel, itemsize in [*each.gradients, (len(each.events), 0, 0)]:
            events = each.events[at:place]
            self.device.play([e for e in events if on_host or e[0] not in each.graph], parts, left)
            at = place
            if itemsize == self.set.size:  # those of parts in fp32 are added up where they are
                self.learned(numel)
        return list(left.values())

    def _optimize(self, shapes: Sequence[torch.Size], tape: Tape) -> None:
        """A step over tensors of these shapes; state stays from the first one on."""
        events = self.set.step(shapes)[1 if self._stepped else 0]
        stay = {number for number, _ in events} - {number for number, size in events if size < 0}
        parts = {number: part.STATE if number in stay else part.STEP for number, _ in events}
        tape.play(events, [parts.get(number, "") for number in range(1 + max(parts, default=0))], {})

    def _weights(self, weights: Sequence[Weight]) -> None:
        for weight in weights:
            self.device.take(part.WEIGHTS, self.set.bytes_of(weight))

    def _buckets(self, weights: Sequence[Weight]) -> None:
        """Gradients as `train.engine.reduce` holds them."""
        for bucket in chunks([weight.numel for weight in reversed(weights)], BUCKET_NUMEL):
            self.device.take(part.GRADIENTS, FP32 * bucket)


class Plain(Script):
    """Everything on every rank; gradients in fp32 buckets that stay."""

    def build(self) -> None:
        """Weights, masters, buckets."""
        self._weights(self.set.weights)
        if self.set.size < FP32:
            for weight in self.set.spread:
                self.device.take(part.MASTERS, FP32 * weight.numel)
        self._buckets(self.set.trained)

    def step(self) -> None:
        """Over each parameter's master."""
        self._optimize([weight.shape for weight in self.set.trained], self.device)


def chunks(numels: Sequence[int], most: int) -> list[int]:
    """Sums of runs of at most `most` elements, or of one parameter, as `train.engine.reduce` cuts its buckets."""
    found: list[int] = []
    for numel in numels:
        if found and found[-1] + numel <= most:
            found[-1] += numel
        else:
            found.append(numel)
    return found
