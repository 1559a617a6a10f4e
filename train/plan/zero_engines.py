"""What DeepSpeed's optimizers allocate on one rank, as the source of 0.19.8 has it and as its tensors were counted."""

from __future__ import annotations

import math

import torch

from train.plan import tape as part
from train.plan.engines import FP32, Plain, Script, Setting, chunks
from train.plan.gathering import Gathered, gathered


class ZeroScript(Script):
    """What DeepSpeed's optimizers share."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        assert setting.zero is not None
        self.zero = setting.zero
        self.numel = sum(weight.numel for weight in setting.spread)
        self.replicas = [weight for weight in setting.trained if weight.fp32]
        self.shares = [math.ceil(sum(w.numel for w in group) / setting.world) for group in setting.groups]
        """Elements of each group on one rank."""
        self.home = self.host if self.zero.offload else self.device
        """Where masters and state are."""

    @property
    def share(self) -> int:
        """Trained elements on one rank."""
        return sum(self.shares)

    def build(self) -> None:
        """First what DeepSpeed does not see (`train.engine.replicas`); the rest by the stage."""
        self._weights([weight for weight in self.set.weights if weight.fp32])
        self._buckets(self.replicas)
        self.build_spread()

    def build_spread(self) -> None:
        """What DeepSpeed makes of the rest."""
        raise NotImplementedError

    def step(self) -> None:
        """What is spread first."""
        self.step_spread()
        if self.replicas:
            self._optimize([weight.shape for weight in self.replicas], self.device)

    def step_spread(self) -> None:
        """The step of DeepSpeed's optimizer."""
        raise NotImplementedError

    def _bucket(self) -> int:
        """Elements of a reduce bucket that are really used."""
        fill = max(self.numel if self.numel <= self.zero.bucket else self.zero.bucket, 1)
        return self.zero.bucket if self.set.reserve_buckets else fill


class Stage12(ZeroScript):
    """`DeepSpeedZeroOptimizer`: stage 2, and stage 1 in fp32."""

    def build_spread(self) -> None:
        """Trained weights move into one flat buffer a group; each rank clones its share as masters."""
        size, device = self.set.size, self.device
        self._weights([weight for weight in self.set.weights if not weight.trained and not weight.fp32])
        first = []
        for group, share in zip(self.set.groups, self.shares, strict=True):
            before = device.take(part.BUILD, size * sum(weight.numel for weight in group))
            device.take(part.WEIGHTS, size * sum(weight.numel for weight in group))
            device.give(before)
            self.home.take(part.MASTERS, FP32 * share)
            if self.zero.offload:
                self.host.take(part.WEIGHTS, size * share)
            first.append((self.home, self.home.take(part.GRADIENTS, FP32 * share)))
        if self.zero.offload:
            largest = max(weight.numel for weight in self.set.spread)
            self.host.take(part.BUCKETS, size * largest)
            device.take(part.BUCKETS, size * largest)
        else:
            for tape, number in first:
                tape.give(number)
        self._held: list[int] = []
        self._ipg: list[int] = []

    def begin_pass(self) -> None:
        """The reduce bucket is made anew for each backward pass."""
        buffers = 2 if self.zero.overlap else 1
        self._ipg = [self.device.take(part.BUCKETS, self.set.size * self._bucket()) for _ in range(buffers)]

    def end_pass(self, last: bool) -> None:
        """The rank's own share of the gradients is copied out of the bucket."""
        device = self.device
        if not self.zero.offload and not self._held:
            self._held = [device.take(part.GRADIENTS, FP32 * self.share)]
        if self.set.size < FP32 or self.set.world > 1:
            # Laid out anew, in fp32, for the sum over the ranks.
            device.give(device.take(part.BUCKETS, FP32 * min(self.zero.bucket, self.numel)))
        device.give(*self._ipg)

    def step_spread(self) -> None:
        """One group after the other; the gradients of all of them wait."""
        for share in self.shares:
            flat = None if self.zero.offload else self.device.take(part.GRADIENTS, FP32 * share)
            self._optimize([torch.Size((share,))], self.home)
            if flat is not None:
                self.device.give(flat)
        self.device.give(*self._held)
        self._held = []


class Bf16Stage1(ZeroScript):
    """`BF16_Optimizer`: stage 1 with bf16 weights; every rank holds all gradients in fp32."""

    def build_spread(self) -> None:
        """Flat bf16 weights, fp32 gradients of all of them, masters of the rank's share."""
        size, device = self.set.size, self.device
        self._weights([weight for weight in self.set.weights if not weight.trained and not weight.fp32])
        for group, share in zip(self.set.groups, self.shares, strict=True):
            numel = sum(weight.numel for weight in group)
            before = device.take(part.BUILD, size * numel)
            device.take(part.WEIGHTS, size * numel)
            device.give(before)
            device.take(part.MASTERS, FP32 * share)
            device.take(part.GRADIENTS, FP32 * numel)
        self._low: list[int] = []

    def begin_pass(self) -> None:
        """See `learned`."""
        self._first = not self._low

    def learned(self, numel: int) -> None:
        """Gradients in bf16, added to the fp32 ones when the pass is over; they stay until the step is over."""
        if self._first:
            self._low.append(self.device.take(part.GRADIENTS, self.set.size * numel))

    def end_pass(self, last: bool) -> None:
        """Each is cast to fp32 to be added."""
        for weight in reversed(self.set.spread):
            self.device.give(self.device.take(part.GRADIENTS, FP32 * weight.numel))

    def step_spread(self) -> None:
        """Over the flat masters."""
        self._optimize([torch.Size((share,)) for share in self.shares], self.device)
        self.device.give(*self._low)
        self._low = []


class Stage3(ZeroScript):
    """`DeepSpeedZeroOptimizer_Stage3`: weights too are spread, and gathered where they are used."""

    def build_spread(self) -> None:
        """Each rank's pieces of all weights; buckets and gradients stay for the whole run."""
        size, world, device = self.set.size, self.set.world, self.device
        pieces = {weight.name: math.ceil(weight.numel / world) for weight in self.set.weights if not weight.fp32}
        numbers = [
            (weight, device.take(part.WEIGHTS, size * pieces[weight.name]))
            for weight in self.set.weights
            if not weight.fp32
        ]
        device.take(part.WEIGHTS, size * sum(pieces[weight.name] for weight in self.set.spread))
        device.give(*[number for weight, number in numbers if weight.trained])  # now views of the buffer
        # In fp32, too: it compares a torch.device with its name, finds them unlike, and clones.
        self.home.take(part.MASTERS, FP32 * self.share)
        gradients = self.home.take(part.GRADIENTS if self.zero.offload else part.BUILD, FP32 * self.share)
        device.take(part.BUCKETS, FP32 * self._bucket())
        self.home.take(part.GRADIENTS, FP32 * self.share)
        if not self.zero.offload:
            self.home.give(gradients)
        self._gathered: list[int] = []

    def begin_pass(self) -> None:
        """The weights that are gathered at once, at the most."""
        # A rank alone has all of them and copies nothing.
        if self.set.world == 1:
            return
        # Of what comes by one collective also the flat buffer that it fills, and what the library copies on its way.
        found = self.gathered()
        numel = found.small + found.large + self.set.gather_buffers * found.fetched
        self._gathered = [self.device.take(part.GATHERED, self.set.size * numel)]

    def gathered(self) -> Gathered:
        """The most that is there at once."""
        zero = self.zero
        return gathered(
            self.set.modules,
            prefetch=zero.prefetch,
            persistent=zero.persistent,
            max_live=zero.max_live,
            reuse=zero.reuse,
        )

    def end_pass(self, last: bool) -> None:
        """Gradients of a bucket are laid out anew for the reduce-scatter."""
        self.device.give(self.device.take(part.BUCKETS, FP32 * min(self.zero.bucket, self.numel)))
        self.device.give(*self._gathered)

    def step_spread(self) -> None:
        """One sub-group after the other."""
        for share in self.shares:
            for piece in chunks([share], self.zero.sub_group):
                flat = None if self.zero.offload else self.device.take(part.GRADIENTS, FP32 * piece)
                self._optimize([torch.Size((piece,))], self.home)
                if flat is not None:
                    self.device.give(flat)


def script_of(setting: Setting) -> Script:
    """The script of the engine that the setting asks for."""
    if setting.zero is None:
        return Plain(setting)
    if setting.zero.stage == 3:
        return Stage3(setting)
    low = setting.size < FP32
    return Bf16Stage1(setting) if setting.zero.stage == 1 and low and not setting.zero.offload else Stage12(setting)
