"""Gradients of a step: accumulated in fp32 and summed over the ranks, in buckets that never move.

torch's DistributedDataParallel would do for fp32, but three promises need more than it gives:

- With bf16 weights it accumulates and reduces in bf16; here both happen in fp32.
- It rebuilds its buckets after the first step. Rings of three and more ranks then add in another order, so that a
  resumed run, one bucket order behind, would differ from the uninterrupted one in the last bit.
- It averages; here the sum is the sum, exact for any number of ranks.

The buckets are one flat fp32 tensor each, whose views are the gradients that the optimizer reads (as `main_grad` of
Megatron-LM, Narayanan et al. 2021, arXiv:2104.04473). A bucket is sent while the backward pass still works on the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from train.engine.base import World

BUCKET_NUMEL = 16 * 2**20
"""Elements of a bucket (64 MiB): long enough for the network, short enough to overlap with the backward pass."""


class _Bucket:
    """A run of parameters, each with its master, whose gradients share one tensor."""

    def __init__(self, members: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        parameters = [parameter for parameter, _ in members]
        self.count = self.waiting = len(parameters)
        """Parameters, and those whose gradient of the last micro-batch is still to come."""
        self._copied = [parameter is not master for parameter, master in members]
        self.old = [False] * self.count
        """Whose view holds what is forgotten: the next gradient takes its place, which saves a pass over it."""
        numels = [parameter.numel() for parameter in parameters]
        self.flat = torch.zeros(sum(numels), dtype=torch.float32, device=parameters[0].device)
        pieces = torch.split(self.flat, numels)
        self.views = [piece.view_as(parameter) for piece, parameter in zip(pieces, parameters, strict=True)]

    def take(self, index: int, gradient: torch.Tensor) -> None:
        """Adds to what the view holds."""
        if self.old[index]:
            self.views[index].copy_(gradient)
            self.old[index] = False
        else:
            self.views[index].add_(gradient)

    def forget(self) -> None:
        """All of it; autograd itself adds to what is not copied, which thus has to be zero at once."""
        self.old = list(self._copied)
        if not any(self.old):
            self.flat.zero_()
            return
        for old, view in zip(self.old, self.views, strict=True):
            if not old:
                view.zero_()

    def fill(self) -> None:
        """What got no gradient since is zero."""
        for index in [index for index, old in enumerate(self.old) if old]:
            self.views[index].zero_()
            self.old[index] = False


class GradientReducer:
    """Owns the gradients of `working` and presents them, summed, as the ``.grad`` of `masters`.

    Args:
        working: parameters that the backward pass writes to.
        masters: the fp32 tensors that the optimizer steps; the same objects where training is in fp32.
        world: ranks to sum over.
    """

    def __init__(self, working: Sequence[torch.Tensor], masters: Sequence[torch.Tensor], world: World) -> None:
        self._world = world
        self._buckets: list[_Bucket] = []
        self._sent: list[dist.Work | None] = []
        self._armed = False
        self._hooks = []
        for members in _chunks(list(zip(working, masters, strict=True))[::-1]):
            bucket = _Bucket(members)
            self._buckets.append(bucket)
            for index, (parameter, master) in enumerate(members):
                master.grad = bucket.views[index]
                if parameter is not master or world.size > 1:
                    self._hooks.append(self._watch(parameter, index, bucket))

    def _watch(self, parameter: torch.Tensor, index: int, bucket: _Bucket) -> torch.utils.hooks.RemovableHandle:
        """Moves each new gradient of `parameter` into its view; fp32 ones are added there by autograd itself."""

        def on_gradient(parameter: torch.Tensor) -> None:
            if parameter.grad is not bucket.views[index]:
                assert parameter.grad is not None
                bucket.take(index, parameter.grad)
                parameter.grad = None
            if self._armed:
                assert bucket.waiting > 0, "a second gradient in one backward pass: reentrant activation checkpointing"
                bucket.waiting -= 1
                self._send_ready()

        handle: torch.utils.hooks.RemovableHandle = parameter.register_post_accumulate_grad_hook(on_gradient)  # type: ignore[no-untyped-call]
        return handle

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradients of `loss`; after the last micro-batch the sums over all ranks are in place."""
        self._armed = last and self._world.size > 1
        for bucket in self._buckets:
            bucket.waiting = bucket.count
        loss.backward()  # type: ignore[no-untyped-call]
        if last:
            for bucket in self._buckets:
                bucket.fill()
        if self._armed:
            self.sum_up()
            self._armed = False

    def sum_up(self) -> None:
        """Sums over all ranks what is not under way yet; returns when the sums are in place."""
        if self._world.size == 1:
            return
        self._send_ready(all_of_them=True)
        for work in self._sent:
            if work is not None:
                work.wait()
        self._sent.clear()

    def _send_ready(self, all_of_them: bool = False) -> None:
        """Starts the sums of finished buckets, always in the same order, which all ranks must share."""
        while len(self._sent) < len(self._buckets):
            bucket = self._buckets[len(self._sent)]
            if bucket.waiting > 0 and not all_of_them:
                return
            self._sent.append(dist.all_reduce(bucket.flat, async_op=True))

    def zero(self) -> None:
        """Forgets the step's gradients; the buckets stay. Masters show what is none until the next ones are done."""
        for bucket in self._buckets:
            bucket.forget()

    def close(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()


def _chunks(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    chunk: list[tuple[torch.Tensor, torch.Tensor]] = []
    numel = 0
    for pair in pairs:
        if chunk and numel + pair[0].numel() > BUCKET_NUMEL:
            yield chunk
            chunk, numel = [], 0
        chunk.append(pair)
        numel += pair[0].numel()
    if chunk:
        yield chunk
