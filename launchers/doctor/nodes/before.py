"""The cheap part, on the host that a job is submitted from: what is wrong there would be wrong on every node.

The rest of that host tells nothing: a login node has no devices, limits of its own, and often another environment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from configs.errors import CrosstuneError, DeviceError, NoRoomError
from configs.schema.roots import TrainConfig
from launchers.doctor.nodes.machine import room
from launchers.doctor.nodes.request import existing_part
from launchers.environment import ascend_config
from train.devices.ascend_variables import misspelt
from train.units import in_gib

LEAST_BYTES = 64 * 2**20
"""Free in the run's folder; logs alone need them. What checkpoints need is for `crosstune plan` to say."""


def before_submit(cfg: TrainConfig, variables: Mapping[str, str]) -> Iterator[CrosstuneError]:
    """What can be told before a job is submitted; nothing is written and no other machine is asked.

    Args:
        cfg: of the step; `run_dir` is set.
        variables: that the job will have.
    """
    folder = existing_part(str(cfg.run_dir))
    try:
        free = room(folder)["free_bytes"]
    except OSError as error:
        yield NoRoomError("run_dir", f"'{folder}' cannot be asked for its room: {error.strerror}")
    else:
        if free < LEAST_BYTES:
            found = f"'{folder}' has {in_gib(free)} free, too little for a run's logs"
            yield NoRoomError("run_dir", found, remedy="make room, or name another run_dir")
    ascend = ascend_config(cfg.device)
    for name, right in sorted(misspelt(variables, ascend.known_variables).items()) if ascend else ():
        remedy = f"did you mean {right}? If the nodes' CANN knows it: device.known_variables=[{name}]"
        yield DeviceError(f"environment.{name}", "no such variable; it would do nothing", remedy=remedy)
