"""Whether a device's version of an op agrees with the reference: on the device, in the working dtype, in a second.

Both versions run on the same small inputs. The truth is the reference in fp64 on the CPU. Compared are values and the
gradients of every input that training differentiates; the error of a result is the largest error of a row (a token's
head, a token's hidden state, a weight) relative to the root mean square of the rows. A version agrees where its error
is at most `FACTOR` times the larger of the reference's own error in that dtype and the dtype's epsilon (bf16: 2^-7,
fp32: 2^-23): it may round at other places, but no worse than a few last digits. For attention the masks are examined
besides, by exact comparison, which no rounding blurs: another sample's tokens, and later ones of the same sample,
must change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from configs.errors import first_line
from train.devices.base import memory_is_full
from train.ops.kernel import REFERENCES, Needs, Version
from train.ops.packed_attention import Lengths
from train.ops.trials import MANY, WINDOW, Trial, attend, attention_trial, trials

FACTOR = 4.0
"""Errors of a few roundings that fall together unhappily; a wrong formula is off by far more."""
CPU = torch.device("cpu")


def disagreement(op: str, version: Version, needs: Needs, dtype: torch.dtype, device: torch.device) -> str | None:
    """What a version of `op` does otherwise than the reference, and by how much; None: nothing.

    Args:
        op: a name of `REFERENCES`.
        version: the device's.
        needs: sizes at which it is tried.
        dtype: the working dtype.
        device: where it runs.

    Raises:
        RuntimeError: memory ran out, which says nothing of the version.
    """
    try:
        for trial in trials(op, needs):
            found = _compare(trial, REFERENCES[op], version, dtype, device)
            if found:
                return found
        if op == "attention":
            return _masks(version, needs, dtype, device) or _dropout(version, needs, dtype, device)
    except Exception as error:  # whatever a kernel raises, the reference is there
        if memory_is_full(error):
            raise
        first = first_line(error) or type(error).__name__
        return f"it raised {type(error).__name__}: {first}"
    return None


def _compare(
    trial: Trial, reference: Version, version: Version, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Values and gradients of one trial."""
    rounded = {key: value.to(dtype) for key, value in trial.inputs.items()}
    truth = _results(trial, reference, {key: value.double() for key, value in rounded.items()})
    there = {key: value.to(device) for key, value in rounded.items()}
    own, others = _results(trial, reference, there), _results(trial, version, there)
    for part, exact in truth.items():
        found = others[part]
        if found.shape != exact.shape or found.dtype != dtype:
            return f"{trial.name}: {part} are {found.dtype} {list(found.shape)}, not {dtype} {list(exact.shape)}"
        error, allowed = _error(found, exact), FACTOR * max(_error(own[part], exact), torch.finfo(dtype).eps)
        if not error <= allowed:
            return f"{trial.name}: {part} are off by {error:.2g}, allowed {allowed:.2g}"
    return None


def _results(trial: Trial, version: Version, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values, and gradients of a random weighted sum of them."""
    leaves = {key: value.clone().requires_grad_(key in trial.differentiated) for key, value in inputs.items()}
    with torch.enable_grad():
        out = trial.call(version, leaves)
    if not trial.differentiated:
        return {"values": out.detach()}
    gradients = torch.autograd.grad(out, [leaves[key] for key in trial.differentiated], _weights(out))
    names = (f"gradients of {key}" for key in trial.differentiated)
    return {"values": out.detach(), **dict(zip(names, gradients, strict=True))}


def _weights(out: torch.Tensor) -> torch.Tensor:
    """The same whoever asks: drawn on the CPU, by the shape alone, and exact in bf16."""
    drawn = torch.randint(-8, 9, out.shape, generator=torch.Generator().manual_seed(1))
    return drawn.to(out.device, out.dtype) / 8


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error of a row over the root mean square of the rows; NaN where something is not finite."""
    rows = exact.norm(dim=-1)
    worst = (found.detach().to(CPU, torch.float64) - exact).norm(dim=-1).max()
    return float(worst / rows.square().mean().sqrt())


def _masks(version: Version, needs: Needs, dtype: torch.dtype, device: torch.device) -> str | None:
    """Exact: what must not be seen changes no bit, and gets a gradient of 0."""
    shared = min(2, needs.kv_heads)
    sizes = (shared * min(2, needs.heads // needs.kv_heads), shared, needs.head_dim)
    for window in (None, WINDOW) if needs.sliding_window is not None else (None,):
        draw = torch.Generator().manual_seed(2)
        first, second = (attention_trial("", MANY, sizes, window, draw).inputs for _ in range(2))
        leaves = {key: value.to(device, dtype).requires_grad_() for key, value in first.items()}
        with torch.enable_grad():
            out = attend(version, leaves, lengths=MANY, window=window)
        for name, changed, unseeing in _interventions(MANY, window):
            at = changed.to(device)[None, None, :, None]
            mixed = {key: torch.where(at, second[key].to(device, dtype), leaves[key].detach()) for key in leaves}
            difference = (attend(version, mixed, lengths=MANY, window=window) - out)[:, unseeing.to(device)]
            if difference.abs().max() != 0:
                return f"{name} reach outputs that must not see them (by {difference.abs().max():.2g})"
            upstream = _weights(out) * unseeing.to(device)[None, :, None, None]
            gradients = torch.autograd.grad(out, list(leaves.values()), upstream, retain_graph=True)
            for key, gradient in zip(leaves, gradients, strict=True):
                if (leak := (gradient * at).abs().max()) != 0:
                    return f"{name} get gradients of {key} from outputs that must not see them ({leak:.2g})"
    return None


def _interventions(lengths: Lengths, window: int | None) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """What is changed in a row, and which outputs must not notice: name, changed tokens, unseeing tokens."""
    [row] = lengths
    sample = torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row))
    place = torch.cat([torch.arange(length) for length in row])
    late = place >= 120
    found = [
        ("tokens of the sample before", sample == 0, sample > 0),
        ("tokens of the sample behind", sample == 2, sample < 2),
        ("later tokens", late, ~late),
    ]
    if window is not None:
        found.append((f"tokens before a window of {window}", place < 30, place >= 30 + window - 1))
    return found


def _dropout(version: Version, needs: Needs, dtype: torch.dtype, device: torch.device) -> str | None:
    """Dropout keeps the right share, keeps the mean, and drops the same in both directions.

    With values of 1 an output is the sum of the kept weights over the share kept: 1 on average, its variance as
    with the reference. Attention is linear in the values, so for each of a head's dimensions the sum of out * w is
    that of value * gradient of value, if both directions drop the same.
    """
    if needs.dropout == 0:
        return None
    trial = attention_trial("dropout", MANY, (2, 1, needs.head_dim), None, torch.Generator().manual_seed(3))
    inputs = {key: value.to(device, dtype) for key, value in trial.inputs.items()}
    ones = inputs | {"value": torch.ones_like(inputs["value"]).requires_grad_()}
    with torch.enable_grad():
        out, other = (
            attend(each, ones, lengths=MANY, window=None, dropout=needs.dropout)
            for each in (version, REFERENCES["attention"])
        )
    # Where a query looks at few keys, a single draw would decide.
    counted = torch.cat([torch.arange(length) for length in MANY[0]]) >= 32
    weights = _weights(out) * counted.to(device)[None, :, None, None]
    [gradient] = torch.autograd.grad(out, [ones["value"]], weights)
    kept, usual, weights, gradient = (x.detach().to(CPU, torch.float64) for x in (out, other, weights, gradient))
    forwards, backwards = (kept * weights).sum((0, 1, 2)), gradient.sum((0, 1, 2))
    kept, usual = kept[:, counted, :, 0], usual[:, counted, :, 0]
    mean, spread, expected = (float(x) for x in (kept.mean(), (kept - 1).square().mean(), (usual - 1).square().mean()))
    if not 0.5 < spread / expected < 2 or abs(mean - 1) > 6 * (expected / kept.numel()) ** 0.5:
        return (
            f"dropout {needs.dropout:g}: outputs vary by {spread:.2g} around {mean:.2g}, not by {expected:.2g} around 1"
        )
    # Two draws differ by the root of twice the variance, relative to the sums.
    if not (forwards - backwards).norm() < (expected / 2) ** 0.5 * forwards.norm():
        return f"dropout {needs.dropout:g}: the backward pass drops other weights than the forward pass"
    return None
