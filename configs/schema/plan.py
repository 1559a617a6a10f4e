"""The root of `crosstune plan`: a run's config, and what the plan should assume about machines and data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from configs.errors import ConfigError
from configs.schema.roots import RunConfig
from configs.sizes import AMOUNT, UNITS

FIT = re.compile(rf"\s*{AMOUNT}\s*(?:[x*]\s*(\d+)\s*)?", re.IGNORECASE)


@dataclass
class PlanOptions:
    """What nobody but the user can know before a run starts."""

    flops: float = 0.0
    """FLOP/s that one device really reaches. 0: `device.peak_tflops`, or the card's published peak, times `mfu`."""
    mfu: float = 0.35
    """Share of the peak that the model's own FLOPs reach; an assumption: a run's metrics tell the real one."""
    measure: bool = False
    """Times a matrix product on this machine's device, for `flops`."""
    nodes: int = 1
    """Machines, each with `nproc` processes; where `nproc` is left at 1, an equal part of those that `fit` names."""
    supervised_share: float = 0.0
    """Of all tokens. 0: as the prepared data in `dataset.path` say, else 1, the most that can be."""
    reserve_gib: float = 2.0
    """Per device, for what torch does not count: the driver's context, buffers of a collective library that does not
    publish them. Part of what must fit; nothing on a CPU."""

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ConfigError("plan.nodes", str(self.nodes), allowed="1 or more")
        for key in ("flops", "reserve_gib"):
            if getattr(self, key) < 0:
                raise ConfigError(f"plan.{key}", str(getattr(self, key)), allowed="0 or more")
        if 0 < self.flops < 1e9:
            remedy = f"FLOP/s of one device: plan.flops={self.flops:g}e12 for {self.flops:g} TFLOP/s"
            raise ConfigError("plan.flops", f"{self.flops:g}", allowed="0, or 1e9 and more", remedy=remedy)
        if not 0 < self.mfu <= 1:
            raise ConfigError("plan.mfu", str(self.mfu), allowed="above 0, up to 1")
        if not 0 <= self.supervised_share <= 1:
            raise ConfigError("plan.supervised_share", str(self.supervised_share), allowed="0 (as the data say) to 1")


@dataclass
class PlanConfig(RunConfig):
    """`crosstune plan`: what a run would need, before anything starts."""

    fit: str | None = None
    """Lists the settings that fit into these devices, such as ``64GiB x 8``, and why the others do not."""
    plan: PlanOptions = field(default_factory=PlanOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit is not None:
            room(self.fit)


def room(text: str) -> tuple[int, int | None]:
    """Bytes of one device, and devices; None where the text does not say how many.

    Raises:
        ConfigError: it is no such text.
    """
    found = FIT.fullmatch(text)
    if found is None or not float(found[1]) or found[3] == "0":
        raise ConfigError("fit", f"'{text}'", allowed="memory of one device and how many: fit='64GiB x 8'")
    return int(float(found[1]) * UNITS[found[2].lower()]), int(found[3]) if found[3] else None
