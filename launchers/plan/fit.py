"""Which ways to compute the same run fit into given devices, the fastest and simplest first, and why others do not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError
from configs.schema.model import Precision
from configs.schema.plan import PlanConfig, room
from configs.schema.sharding import PlainConfig, ShardingConfig, ZeroConfig

if TYPE_CHECKING:
    from launchers.plan.command import Plan

SHARDINGS = ("plain", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
"""In the order in which they cost time: less of everything is spread, nothing moves to the host before it must."""


def settings_that_fit(made: Plan) -> list[dict[str, Any]]:
    """A line for each sharding, with and without recomputation, in each number format.

    The largest `micro_batch_tokens` is looked for by halving it: it changes memory and speed, not the gradients.

    Returns:
        Those that fit before those that do not; each with ``fits``, its settings, ``needs_bytes`` (None where a run
        would refuse the setting) and, where it does not fit, ``reason``.
    """
    assert made.cfg.fit is not None
    limit, _ = room(made.cfg.fit)
    lines = [_line(made, *choice, limit) for choice in _choices(made)]
    return sorted(lines, key=lambda line: not line["fits"])  # stable: the order of the choices stays


def _choices(made: Plan) -> Iterator[tuple[str, bool, Precision]]:
    asked = made.cfg.model.precision
    precisions = [Precision.bf16, Precision.fp32] if asked is Precision.auto else [asked]
    precisions += [each for each in (Precision.bf16, Precision.fp32) if each not in precisions]
    for precision in precisions:
        for recompute in (False, True):
            for sharding in SHARDINGS:
                if made.world > 1 or sharding in ("plain", "zero2_offload", "zero3_offload"):
                    yield sharding, recompute, precision


def _line(made: Plan, sharding: str, recompute: bool, precision: Precision, limit: int) -> dict[str, Any]:
    from train.devices.base import DTYPES
    from train.plan.predict import BASE

    tried: dict[str, Any] = {}
    for tokens in _halvings(made.cfg):
        cfg = replace(
            made.cfg,
            sharding=_sharding(made.cfg, sharding),
            activation_checkpointing=recompute,
            activation_checkpointing_every=1,
            micro_batch_tokens=tokens,
            fit=None,
        )
        settings = {
            "sharding": sharding,
            "activation_checkpointing": recompute,
            "precision": precision.value,
            "micro_batch_tokens": tokens,
        }
        try:
            forecast = made.predictor(cfg, DTYPES[precision], made.world).forecast()
        except ConfigError as error:
            return {"fits": False, **settings, "needs_bytes": None, "reason": f"{error.where}: {error.found}"}
        parts = {**forecast.parts, **made.beside(cfg)}
        needs = forecast.device_bytes + sum(made.beside(cfg).values())
        tried = {
            "fits": needs <= limit,
            **settings,
            "needs_bytes": needs,
            "host_bytes": forecast.host_bytes,
            "machine_host_bytes": made.on_host(forecast),
        }
        if tried["fits"]:
            return tried
        tried["reason"] = _reason(parts, {BASE, *made.beside(cfg)}, limit)
        if tokens <= made.cfg.max_length or forecast.device_bytes - _of_a_pass(parts) > limit:
            return tried  # a smaller micro-batch would not help
    return tried


def _reason(parts: Mapping[str, int], fixed: Collection[str], limit: int) -> str:
    """The largest part that a setting can change, unless one that none can change is too large by itself."""
    name = max(parts, key=lambda each: (each in fixed and parts[each] > limit, each not in fixed, parts[each]))
    return f"{name} alone {'takes' if parts[name] <= limit else 'exceeds it:'} {parts[name] / 2**30:.1f} GiB"


def _of_a_pass(parts: dict[str, int]) -> int:
    """What shrinks with the micro-batch."""
    from train.plan import tape
    from train.plan.predict import HELD

    return sum(parts.get(name, 0) for name in (tape.ACTIVATIONS, tape.LOGITS, HELD))


def _halvings(cfg: PlanConfig) -> Iterator[int]:
    """Sizes of a micro-batch, from the config's own down to one sample of `max_length`."""
    tokens = cfg.micro_batch_tokens
    while tokens > cfg.max_length:
        yield tokens
        tokens //= 2
    yield cfg.max_length


def _sharding(cfg: PlanConfig, name: str) -> ShardingConfig:
    if name == "plain":
        return PlainConfig()
    keys = cfg.sharding.deepspeed if isinstance(cfg.sharding, ZeroConfig) else {}
    return ZeroConfig(stage=int(name[4]), offload_optimizer=name.endswith("offload"), deepspeed=keys)
