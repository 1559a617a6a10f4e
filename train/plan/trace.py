"""One forward and backward pass without numbers: which tensors live when.

The model is built on the meta device, so that no weight is read and none takes memory, and the run's own tuning method
and objective work on it. Every tensor that an operator makes is seen, and when the last reference to it goes (as
``torch.distributed._tools.mem_tracker`` does it): what autograd saves, what recomputation saves anew, logits in their
copies. Attention counts as a fused kernel, which saves query, key, value, output and one number a row: that is what
SDPA runs on the CPU and on every accelerator that has one.

The graph that autograd builds is seen too: its nodes are small, but on a host they lie between the tensors.

Not seen: what an operator takes for itself while it works, and the copies of weights that ZeRO-3 gathers (`engines`).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.data.plan import RowKind
from train.ops.packed_attention import Pack
from train.plan.outcomes import Outcomes

FREED = -1
"""In place of a size: the event frees a tensor."""
Event = tuple[int, int]
"""Number of a tensor, and its bytes or `FREED`."""
NODE = 488
"""Bytes of a node of autograd's graph, as most of torch 2.13's are; beside it lie its edges and the shapes it saves."""
EDGE = 16


@dataclass(frozen=True)
class Pass:
    """What one micro-batch allocates and frees, in order."""

    events: list[Event]
    forward_ends: int
    """Events before the loss is there."""
    gradients: list[tuple[int, int, int]]
    """Event after which the gradient of so many trained weights, of so many bytes each, is there, in the order of the
    backward pass."""
    wide: set[int]
    """Numbers of the tensors with one entry per word of the vocabulary: logits, their copies and gradients."""
    graph: set[int] = field(default_factory=set)
    """Numbers that are no tensors but pieces of autograd's graph, which a host's memory holds until the pass ends."""

    @property
    def tensors(self) -> int:
        """How many there are."""
        return 1 + max((number for number, _ in self.events), default=-1)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every storage that operators make, and its end."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.wide: set[int] = set()
        self.graph: set[int] = set()
        self._vocabulary = vocabulary
        self._numbers: dict[int, int] = {}
        self._made = 0
        self._outcome = Outcomes()
        self.on = self.forward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            out = _grouped_product(func, *args, **(kwargs or {}))
        else:
            out = self._outcome(func, args, kwargs or {})
        if self.on:
            if self.forward:
                self._note_down(args)
            for each in tree_leaves(out):
                if isinstance(each, torch.Tensor):
                    self._see(each.untyped_storage(), wide=each.dim() > 0 and each.shape[-1] == self._vocabulary)
        return out

    def know(self, tensors: Iterator[torch.Tensor]) -> None:
        """Storages that were there before."""
        for tensor in tensors:
            self._numbers[tensor.untyped_storage()._cdata] = -1

    def _see(self, storage: torch.UntypedStorage, wide: bool) -> None:
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = number = self._next()
            self.events.append((number, storage.nbytes()))
            if wide:
                self.wide.add(number)
            weakref.finalize(storage, self._gone, key, number)

    def _note_down(self, args: Any) -> None:
        """What autograd keeps of a call: a node, an edge to each input that learns, and the inputs' shapes."""
        learned = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor) and each.requires_grad]
        if learned and torch.is_grad_enabled():
            for size in (NODE, EDGE * len(learned), *(8 * each.dim() for each in learned)):
                number = self._next()
                self.graph.add(number)
                self.events.append((number, size))

    def _next(self) -> int:
        self._made += 1
        return self._made - 1

    def _gone(self, key: int, number: int) -> None:
        self.events.append((number, FREED))
        self._numbers.pop(key, None)


def _grouped_product(func: Any, left: torch.Tensor, right: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The product of routed experts, which torch 2.13 has on the meta device in bf16 only."""
    out: torch.Tensor = func(left.bfloat16(), right.bfloat16(), *args, **kwargs)
    return out.to(left.dtype)


class _FusedAttention(torch.autograd.Function):
    """The tensors of a fused attention kernel, without its numbers."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    out: torch.Tensor = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out


@contextmanager
def _without_values() -> Iterator[None]:
    """What would take another way on the meta device than on a real one, for a while.

    SDPA is a fused kernel; by the function's name, since a mode would not be heard inside of a backward pass, where
    recomputation runs. And transformers reads positions to see whether a row holds several samples: here none does
    that it should find.
    """
    from transformers import masking_utils

    places = [
        (F, "scaled_dot_product_attention", _attend),
        (masking_utils, "find_packed_sequence_indices", lambda positions: None),
    ]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, function in places:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(places, before, strict=True):
            setattr(module, name, function)


@dataclass(frozen=True)
class Shape:
    """What a micro-batch holds."""

    kind: RowKind
    rows: tuple[tuple[int, ...], ...]
    """For each row the lengths of its samples."""
    supervised: int
    """Positions at which the head runs."""

    @property
    def tokens(self) -> int:
        """Padding included."""
        return len(self.rows) * max(sum(row) for row in self.rows)


def fullest(kind: RowKind, micro_batch_tokens: int, max_length: int, supervised_share: float) -> Shape:
    """The micro-batch that takes the most memory: full, its samples as long as they may be."""
    whole, rest = divmod(micro_batch_tokens, max_length)
    if kind is RowKind.packed:
        rows: tuple[tuple[int, ...], ...] = ((max_length,) * whole + ((rest,) if rest > 1 else ()),)
    else:
        rows = ((max_length,),) * (whole if kind is RowKind.padded else 1)
    tokens = sum(sum(row) for row in rows)
    return Shape(kind, rows, max(1, round(tokens * supervised_share)))


class _Batch:
    """What an objective asks of `train.data.collate.Batch`, on the meta device."""

    def __init__(self, shape: Shape) -> None:
        size = (len(shape.rows), max(sum(row) for row in shape.rows))
        self._ids = torch.zeros(size, dtype=torch.long, device="meta")
        # A mask says at which positions the head runs; here so many of the first ones, told by their numbers.
        self._keep = torch.zeros(max(1, shape.supervised // size[0]), dtype=torch.long, device="meta")
        self.num_targets = len(self._keep) * size[0]
        self.targets_N = torch.zeros(self.num_targets, dtype=torch.long, device="meta")
        self._shape = shape

    def model_inputs(self) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": self._ids,
            "position_ids": self._ids,
            "logits_to_keep": self._keep,
            "use_cache": False,
        }
        if self._shape.kind is RowKind.packed:
            inputs["pack"] = Pack(self._shape.rows)
        return inputs


def trace(module: nn.Module, loss_sum: Callable[..., torch.Tensor], shape: Shape, vocabulary: int) -> Pass:
    """Runs one micro-batch through a model on the meta device.

    Args:
        module: what trains, on the meta device, in training mode.
        loss_sum: of the run's objective.
        shape: of the micro-batch.
        vocabulary: words that the head scores.

    Raises:
        RuntimeError: or another error; the model asks for values, which nobody has here.
    """
    ledger, gradients = _Ledger(vocabulary), []
    ledger.know(each for tensors in (module.parameters(), module.buffers()) for each in tensors)

    def on_gradient(parameter: torch.Tensor) -> None:
        parameter.grad = None  # where it goes is the engine's to say
        gradients.append((len(ledger.events), parameter.numel(), parameter.dtype.itemsize))

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(on_gradient) for parameter in trained]  # type: ignore[no-untyped-call]
    try:
        with _without_cycles(), _without_values(), ledger:
            batch = _Batch(shape)
            ledger.on = ledger.forward = True
            loss = loss_sum(module, batch) / batch.num_targets
            ledger.forward = False  # what recomputation notes down goes at once
            forward_ends = len(ledger.events)
            loss.backward()  # type: ignore[no-untyped-call]
            ledger.on = False
            del loss
    finally:
        for hook in hooks:
            hook.remove()
    return Pass(ledger.events.copy(), forward_ends, gradients, ledger.wide, ledger.graph)


@contextmanager
def _without_cycles() -> Iterator[None]:
    """No collection in between: a tensor's end is when its last reference goes, the same in every run."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def trace_optimizer(
    make: Callable[[list[tuple[str, torch.Tensor]]], torch.optim.Optimizer],
    shapes: Sequence[torch.Size],
    *,
    foreach: bool = False,
    fused: bool = False,
) -> tuple[list[Event], list[Event]]:
    """What an optimizer allocates in its first step, and in a later one.

    Args:
        make: the optimizer over named tensors.
        shapes: of the fp32 tensors that it steps.
        foreach: it works on all of them at once, as torch has it on accelerators: faster, and with copies of all.
        fused: it makes nothing but its state.
    """
    tensors = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
    optimizer = make([(str(number), tensor) for number, tensor in enumerate(tensors)])
    for group in optimizer.param_groups:
        if "foreach" in group:
            group["foreach"] = foreach
    for tensor in tensors:
        tensor.grad = torch.empty_like(tensor)
    ledger = _Ledger(0)
    ledger.know(iter([*tensors, *(tensor.grad for tensor in tensors if tensor.grad is not None)]))
    with ledger:
        ledger.on = True
        optimizer.step()
        first = len(ledger.events)
        optimizer.step()
        ledger.on = False
    steps = ledger.events[:first], ledger.events[first:]
    return (_lasting(steps[0]), []) if fused else steps


def _lasting(events: list[Event]) -> list[Event]:
    """Of tensors that are not freed again."""
    freed = {number for number, size in events if size == FREED}
    return [event for event in events if event[0] not in freed]
