"""Cross-entropy from hidden states, some positions at a time: the logits are never there as a whole.

A chunk's logits are made, scored and turned into gradients while they are at hand, so that memory depends neither on
the number of positions nor, beyond a chunk, on the vocabulary, and nothing is computed twice. The output embedding
itself gives the loss in place of logits (`LossHead`), so that whatever an engine hangs on the module - gathering its
weights, reducing its gradients - goes on as ever.

The idea of gradients in the forward pass is that of Liger Kernel (arXiv:2410.10989) and Cut Cross-Entropy
(arXiv:2411.09009). Not covered: heads that an adapter wraps, and models that do to their logits what is not in
`NEUTRAL`; theirs are made whole (`score`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CHUNK_BYTES = 64 * 2**20
"""Of a chunk's logits, and of those scored at once in fp32: hundreds of positions beside 100,000 words, enough for a
full-speed product."""

ROWS = 64
"""On a host in bf16, positions of a chunk are brought to a multiple of it, so that products have few shapes."""

CACHED_BYTES = 2**20
"""Of the logits in fp32 that a thread of a host scores at once: small enough for its core's cache to hold much of what
it passes over again, large enough for calls not to count. On two cores 4 to 16 positions were as fast."""

NEUTRAL: Mapping[str, float | None] = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}
"""What configs say of logits -> the value that leaves them as they are."""


@dataclass(frozen=True)
class Scoring:
    """What becomes of a position's logits."""

    label_smoothing: float = 0.0
    """Share of the target that all words have in common (Szegedy et al. 2016, arXiv:1512.00567)."""
    z_weight: float = 0.0
    """Of the squared log of the softmax's denominator, which keeps it near 1 (PaLM, arXiv:2204.02311)."""
    factor: float = 1.0
    """On the logits, before anything else."""
    cap: float | None = None
    """Logits x become ``cap * tanh(x / cap)`` (Gemma 2, arXiv:2408.00118)."""


def score(logits_NV: torch.Tensor, targets_N: torch.Tensor, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference version: whole logits, differentiated by autograd.

    Returns:
        The loss summed over the positions, its z part included; and the sum of squares that the z part weighs.
    """
    logits_NV = _bend(logits_NV.float(), scoring)
    loss = F.cross_entropy(logits_NV, targets_N, reduction="sum", label_smoothing=scoring.label_smoothing)
    if not scoring.z_weight:
        return loss, loss.new_zeros(())
    squares = logits_NV.logsumexp(-1).square().sum()
    return loss + scoring.z_weight * squares, squares.detach()


class _Score(torch.autograd.Function):
    """`score` of ``hidden @ weight.T + bias``, with the gradients made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        scoring: Scoring,
        chunk_bytes: int,
        on_host: bool,
        learning: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        to_hidden, to_weight, to_bias = (learning and each for each in ctx.needs_input_grad[:3])
        hidden_grad = torch.empty_like(hidden_ND) if to_hidden else None
        weight_grad = bias_grad = None
        words, parts = len(weight_VD), [torch.zeros(2, dtype=torch.float32, device=hidden_ND.device)]
        # A host scores a few of a chunk's positions at a time, so that only they are there in fp32.
        step = rows = max(1, chunk_bytes // (4 * words))
        if on_host:
            step = max(1, chunk_bytes // (hidden_ND.element_size() * words))
            rows = min(rows, max(1, CACHED_BYTES // (4 * words)) * torch.get_num_threads())
        # A host's library makes code for each new shape of a product in bf16, in milliseconds, and keeps it.
        few = ROWS if on_host and hidden_ND.dtype == torch.bfloat16 and step >= ROWS else 1
        step -= step % few
        if few > 1 and not to_weight:  # a weight's gradient is summed over chunks, which would cost more than shapes do
            step = min(step, 4 * few)
        for start in range(0, len(hidden_ND), step):
            hidden, targets = hidden_ND[start : start + step], targets_N[start : start + step]
            count, more = len(hidden), -len(hidden) % few
            hidden = F.pad(hidden, (0, 0, 0, more)) if more else hidden
            raw = F.linear(hidden, weight_VD, bias_V)
            for at in range(0, count, rows):
                some = slice(at, min(at + rows, count))
                parts.append(_score_rows(raw[some], targets[some], scoring, learning))
            grad = raw  # it has taken their place, or nobody wants one
            del raw
            if more:
                grad[count:] = 0
            if hidden_grad is not None:
                hidden_grad[start : start + count] = (grad @ weight_VD)[:count]
            if to_weight:
                weight_grad = _add(weight_grad, grad.T, hidden)
            if to_bias:
                of_chunk = grad.sum(0, dtype=torch.float32)
                bias_grad = of_chunk if bias_grad is None else bias_grad.add_(of_chunk)
            del grad
        ctx.dtype = weight_VD.dtype
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        loss, squares = (each.clone() for each in torch.stack(parts).sum(0).unbind())
        ctx.mark_non_differentiable(squares)
        return loss, squares

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: a second copy of the weight's gradient may be the most that a step ever holds.
        hidden, weight, bias = (None if each is None else each.mul_(grad) for each in ctx.saved_tensors)
        weight, bias = (None if each is None else each.to(ctx.dtype) for each in (weight, bias))
        return hidden, weight, bias, None, None, None, None, None


def _add(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``total + left @ right`` in fp32, in place: many chunks added in bf16 would lose their last ones."""
    if total is None:
        return (left @ right).float()
    return total.addmm_(left, right) if left.dtype == torch.float32 else total.add_(left @ right)


def _score_rows(raw_nV: torch.Tensor, targets_n: torch.Tensor, scoring: Scoring, learning: bool) -> torch.Tensor:
    """``[2]`` sums as `score` gives them; the gradient of the first with respect to the logits takes their place."""
    logits_nV, eps, index = raw_nV.float(), scoring.label_smoothing, targets_n[:, None]
    if scoring.factor != 1:
        logits_nV = logits_nV * scoring.factor
    bent = None
    if scoring.cap is not None:
        bent = torch.tanh(logits_nV / scoring.cap)
        logits_nV = bent * scoring.cap
    log_p = F.log_softmax(logits_nV, -1)
    picked = log_p.gather(1, index)
    loss = -picked.sum()
    if eps:
        loss = (1 - eps) * loss - eps * log_p.mean(-1).sum()
    log_sum = logits_nV.gather(1, index) - picked
    squares = log_sum.square().sum()
    sums = torch.stack([loss + scoring.z_weight * squares, squares])
    if not learning:
        return sums
    grad = log_p.exp_()
    if scoring.z_weight:
        grad *= 1 + 2 * scoring.z_weight * log_sum
    if eps:
        grad -= eps / grad.shape[1]
    grad.scatter_add_(1, index, grad.new_full((), eps - 1).expand_as(index))
    if bent is not None:
        grad *= bent.square_().neg_().add_(1)
    if scoring.factor != 1:
        grad *= scoring.factor
    raw_nV.copy_(grad)
    return sums


class LossHead:
    """Has a model's output embedding give the loss while targets are set, logits at any other time.

    Args:
        model: of transformers.
        head: its output embedding, a plain linear module; its forward is replaced.
        scoring: of the objective; what the model itself does to logits is taken over from its config.
        chunk_bytes: see `CHUNK_BYTES`.
        on_host: whether a CPU computes, or is stood in for.
    """

    def __init__(self, model: Any, head: nn.Linear, scoring: Scoring, chunk_bytes: int, on_host: bool) -> None:
        config = model.config.get_text_config()
        self._changed = [
            (place, key, value)
            for place in (config, model)
            for key, value in NEUTRAL.items()
            if isinstance(getattr(place, key, None), (int, float))
        ]
        self.scoring = _with_the_models_own(scoring, config)
        self._head, self._chunk_bytes, self._on_host = head, chunk_bytes, on_host
        self._targets_N: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None
        head.forward = self._forward  # type: ignore[assignment]

    @classmethod
    def of(cls, model: Any, scoring: Scoring, chunk_bytes: int, *, on_host: bool) -> tuple[LossHead | None, str]:
        """One for the model, or None and why it cannot have one. Before an engine cuts or hooks the weights."""
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if type(head) is not nn.Linear:
            return None, f"the output embedding is {'unknown' if head is None else f'a {type(head).__name__}'}"
        try:
            made = cls(model, head, scoring, chunk_bytes, on_host)
        except ValueError as error:  # MPT's logit_scale may be a word
            return None, f"its config scales logits in a way of its own ({error})"
        if not made._passes_through(model):
            del head.forward
            return None, f"{type(model).__name__} changes its logits in a way of its own"
        return made, ""

    def loss(
        self, forward: Callable[..., Any], inputs: Mapping[str, Any], targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `score`, of the positions that ``inputs["logits_to_keep"]`` keeps."""
        self._targets_N = targets_N
        try:
            with self._as_they_are():
                loss: torch.Tensor = forward(**inputs).logits
        finally:
            self._targets_N = None
        squares, self._squares = self._squares, None
        assert squares is not None and loss.numel() == 1, "the model did not call its head once"
        return loss.reshape(()), squares

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._targets_N is None:
            return F.linear(hidden, self._head.weight, self._head.bias)
        hidden_ND = hidden.flatten(0, -2)
        if len(hidden_ND) != len(self._targets_N):
            found = f"{len(hidden_ND)} positions reach the head, of which {len(self._targets_N)} have a target"
            raise ValueError(f"{found}: the model does not keep to logits_to_keep")
        loss: torch.Tensor
        loss, self._squares = _Score.apply(  # type: ignore[no-untyped-call]
            hidden_ND,
            self._head.weight,
            self._head.bias,
            self._targets_N,
            self.scoring,
            self._chunk_bytes,
            self._on_host,
            torch.is_grad_enabled(),
        )
        return loss.view(1, 1, 1)

    @contextmanager
    def _as_they_are(self) -> Iterator[None]:
        """The model's own scaling and capping, which are in `scoring`, are off for the time."""
        before = [(place, key, getattr(place, key)) for place, key, _ in self._changed]
        try:
            for place, key, value in self._changed:
                setattr(place, key, value)
            yield
        finally:
            for place, key, value in before:
                setattr(place, key, value)

    def _passes_through(self, model: Any) -> bool:
        """Whether what the head gives comes out unchanged as the model's logits, but for what `scoring` has of it.

        Nothing is computed: the decoder is stood in for, and so is the head.
        """
        device, dtype = self._head.weight.device, self._head.weight.dtype
        # A word each, for models cut some off; from small to large, for some clamp. Any format holds these numbers, so
        # that a format is looked at by itself.
        words = torch.arange(len(self._head.weight), device="cpu")
        given = ((words % 19 - 9) * 2.0 ** (words % 12)).view(1, 1, -1)
        seen: list[int] = []

        def head(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden.shape[:-1].numel())
            return given.clone()

        hidden = torch.zeros(1, 2, self._head.in_features, dtype=dtype, device=device)
        inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=device), "use_cache": False}
        inputs["logits_to_keep"] = torch.ones(1, dtype=torch.long, device=device)
        # A model may lie in another, whose output then is that of the inner one.
        owner = next((each for each in model.modules() if self._head in each.children()), model)
        decoder = getattr(owner, "base_model", owner)
        if decoder is owner:
            return False
        try:
            with (
                torch.no_grad(),
                _stand_in(decoder, lambda *args, **kwargs: _Hidden(hidden)),
                _stand_in(self._head, head),
            ):
                usual = type(model).forward(model, **inputs).logits
                with self._as_they_are():
                    bare = type(model).forward(model, **inputs).logits
        except Exception:  # noqa: BLE001  # code of any family; then its logits are made as it makes them
            return False
        expected = _bend(given, self.scoring)
        told = isinstance(bare, torch.Tensor) and bare.shape == usual.shape == given.shape and seen == [1, 1]
        told = told and bare.dtype in (dtype, torch.float32)
        return (
            told and torch.equal(bare.float(), given) and torch.allclose(usual.float(), expected, rtol=1e-4, atol=1e-4)
        )


class _Hidden:
    """Stands for what a decoder gives: hidden states, and None for all else that a model may ask of it."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor:
        if index != 0:
            raise IndexError(index)
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _stand_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a while."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _bend(logits: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    logits = logits * scoring.factor
    return logits if scoring.cap is None else scoring.cap * torch.tanh(logits / scoring.cap)


def _with_the_models_own(scoring: Scoring, config: Any) -> Scoring:
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return replace(scoring, factor=factor, cap=getattr(config, "final_logit_softcapping", None))
