"""Ascend's run-time settings: the environment variables that CANN, HCCL and torch_npu read when they are loaded.

What the config says wins over the environment, and the environment over crosstune's default. Whatever is misspelt, out
of range or contradictory stops the run before torch is imported, all faults at once: these libraries mostly ignore
what they do not understand, and the run then hangs, or is not deterministic, hours later.

Free of torch, since an installed torch_npu is imported together with torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field

from configs.errors import CrosstuneError, DeviceError, ErrorGroup
from configs.schema.device import AscendConfig
from train.devices.ascend_values import matching_interfaces
from train.devices.ascend_variables import KNOWN, misspelt

CONFIG, ENVIRONMENT, DEFAULT = "config", "environment", "default"

SETTINGS: tuple[tuple[str, str, str | None], ...] = (
    # The rendezvous of a large cluster takes minutes, and HCCL's own 120 s then blames the wrong rank (EI0006).
    ("connect_timeout_seconds", "HCCL_CONNECT_TIMEOUT", "600"),
    ("execute_timeout_seconds", "HCCL_EXEC_TIMEOUT", "1836"),
    ("buffer_mib", "HCCL_BUFFSIZE", "200"),
    ("interface", "HCCL_SOCKET_IFNAME", None),
    ("base_port", "HCCL_IF_BASE_PORT", None),
    # Lengths change from batch to batch here, and fixed segments then fragment.
    ("allocator", "PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True"),
    ("task_queue", "TASK_QUEUE_ENABLE", "2"),
    ("cpu_affinity", "CPU_AFFINITY_CONF", "1"),
)
"""Field of `AscendConfig`, variable, crosstune's default (None: it stays unset)."""
KEYS = {variable: f"device.{key}" for key, variable, _ in SETTINGS} | {"GLOO_SOCKET_IFNAME": "device.interface"}

EXCLUSIVE = (
    ("HCCL_IF_IP", "HCCL_SOCKET_IFNAME", "HCCL then ignores the interface"),
    ("HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_IF_BASE_PORT", "HCCL then ignores the base port"),
    ("PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF", "torch_npu takes one of them only"),
)
"""The first of a pair makes the second one useless."""


@dataclass
class Plan:
    """What the environment would be, before anything is changed."""

    values: dict[str, str] = field(default_factory=dict)
    """Variables that matter, with their values."""
    origins: dict[str, str] = field(default_factory=dict)
    """Of each: ``config``, ``environment`` or ``default``."""
    notes: list[str] = field(default_factory=list)
    """What replaced what, and what a value really means."""
    faults: list[CrosstuneError] = field(default_factory=list)

    def put(self, variable: str, value: str, origin: str) -> None:
        """Sets one variable."""
        self.values[variable], self.origins[variable] = value, origin

    def fault(self, variable: str, found: str, *, allowed: str | None = None, remedy: str | None = None) -> None:
        """One more thing to mend, under the name by which the user set it."""
        where = KEYS.get(variable, variable) if self.origins.get(variable) == CONFIG else variable
        self.faults.append(DeviceError(where, found, allowed=allowed, remedy=remedy))


def settle(cfg: AscendConfig, environment: MutableMapping[str, str]) -> list[str]:
    """Sets Ascend's variables in `environment`; a second call with the same config changes and says nothing.

    Args:
        cfg: the device's config; what is null there comes from the environment, else from crosstune's default.
        environment: mostly ``os.environ``.

    Returns:
        Notes for the user: values of theirs that the config replaced, and values that mean something unexpected.

    Raises:
        DeviceError: a variable is misspelt, out of range, or contradicts another one or the config.
        ErrorGroup: several are.
    """
    found = plan(cfg, environment)
    if found.faults:
        raise found.faults[0] if len(found.faults) == 1 else ErrorGroup(found.faults)
    changes = any(environment.get(name) != value for name, value in found.values.items())
    environment.update(found.values)
    return found.notes if changes else []


def recorded(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` that belong in environment.json: known names only, none of which is a secret."""
    return {name: environment[name] for name in sorted(KNOWN) if name in environment}


def plan(cfg: AscendConfig, environment: Mapping[str, str]) -> Plan:
    """What `settle` would do, with the origin of each value and every fault."""
    # An empty value is what remains of an unset shell variable; but no visible device at all may be meant.
    given = {name: value for name, value in environment.items() if value or name == "ASCEND_RT_VISIBLE_DEVICES"}
    found = Plan()
    for name in KNOWN:
        if name in given:
            found.put(name, given[name], ENVIRONMENT)
    for key, variable, default in SETTINGS:
        _choose(found, variable, getattr(cfg, key), default)
    _deterministic(found, cfg)
    _blocking(found, cfg)
    _interface_of_gloo(found, cfg)
    if "ASCEND_TOOLKIT_HOME" in found.values and "ASCEND_HOME_PATH" not in found.values:
        # Two names of one folder; DeepSpeed asks for the second.
        found.put("ASCEND_HOME_PATH", found.values["ASCEND_TOOLKIT_HOME"], DEFAULT)
    _check_names(found, cfg, given)
    _check_values(found)
    found.faults.extend(_contradictions(found.values))
    found.notes.extend(_meanings(found.values))
    return found


def _choose(found: Plan, variable: str, wanted: object, default: str | None) -> None:
    """Config, environment or default, for one variable."""
    before = found.values.get(variable)
    if wanted is not None:
        if before not in (None, str(wanted)):
            found.notes.append(f"{variable}={before} of the environment is replaced: {KEYS[variable]}={wanted}")
        found.put(variable, str(wanted), CONFIG)
    overruled = [first for first, second, _ in EXCLUSIVE if second == variable and first in found.values]
    if before is None and wanted is None and default is not None and not overruled:
        found.put(variable, default, DEFAULT)


def _deterministic(found: Plan, cfg: AscendConfig) -> None:
    """Reductions in a fixed order; ``strict`` is more than that."""
    if not cfg.deterministic:
        return
    before = found.values.get("HCCL_DETERMINISTIC")
    if before is None:
        found.put("HCCL_DETERMINISTIC", "true", DEFAULT)
    elif before.lower() == "false":
        found.put("HCCL_DETERMINISTIC", "true", CONFIG)
        found.notes.append(
            f"HCCL_DETERMINISTIC={before} of the environment is replaced by true; device.deterministic=false keeps it"
        )


def _blocking(found: Plan, cfg: AscendConfig) -> None:
    """One operator at a time leaves nothing to queue; torch_npu would drop the queue without a word."""
    if cfg.launch_blocking:
        found.put("ASCEND_LAUNCH_BLOCKING", "1", CONFIG)
    queue = found.values["TASK_QUEUE_ENABLE"]
    if found.values.get("ASCEND_LAUNCH_BLOCKING") != "1" or queue == "0":
        return
    if cfg.task_queue is not None:
        found.fault(
            "TASK_QUEUE_ENABLE",
            f"{queue}, but ASCEND_LAUNCH_BLOCKING=1 turns the queue off",
            remedy="device.task_queue=0, or unset ASCEND_LAUNCH_BLOCKING",
        )
        return
    if found.origins["TASK_QUEUE_ENABLE"] == ENVIRONMENT:
        found.notes.append(f"TASK_QUEUE_ENABLE={queue} is replaced by 0: ASCEND_LAUNCH_BLOCKING=1 turns the queue off")
    found.put("TASK_QUEUE_ENABLE", "0", DEFAULT)


def _interface_of_gloo(found: Plan, cfg: AscendConfig) -> None:
    """Collectives on the host take the same interface; gloo wants names, not prefixes."""
    if cfg.interface is not None and "GLOO_SOCKET_IFNAME" not in found.values:
        names = matching_interfaces(cfg.interface)
        if names:
            found.put("GLOO_SOCKET_IFNAME", names[0], CONFIG)


def _check_names(found: Plan, cfg: AscendConfig, given: Mapping[str, str]) -> None:
    for name, right in sorted(misspelt(given, cfg.known_variables).items()):
        found.fault(
            name,
            "no such variable; it would do nothing",
            remedy=f"did you mean {right}? If your CANN knows it: device=ascend device.known_variables=[{name}]",
        )


def _check_values(found: Plan) -> None:
    for name, value in found.values.items():
        check = KNOWN[name]
        allowed = check(value) if check else None
        if allowed:
            remedy = "source CANN's set_env.sh again" if allowed == "a folder that exists" else None
            found.fault(name, f"'{value}'", allowed=allowed, remedy=remedy)


def _contradictions(values: Mapping[str, str]) -> Iterator[DeviceError]:
    """Pairs that cannot both be meant."""
    for first, second, why in EXCLUSIVE:
        if first in values and second in values:
            yield DeviceError(first, f"set together with {second}: {why}", remedy=f"set one of {first} and {second}")
    if values.get("HCCL_INTRA_PCIE_ENABLE") == values.get("HCCL_INTRA_ROCE_ENABLE") == "1":
        yield DeviceError("HCCL_INTRA_ROCE_ENABLE", "1, and HCCL_INTRA_PCIE_ENABLE is 1 too", allowed="one of them")
    if values.get("HCCL_WHITELIST_DISABLE") == "0" and "HCCL_WHITELIST_FILE" not in values:
        yield DeviceError(
            "HCCL_WHITELIST_DISABLE",
            "0, but there is no HCCL_WHITELIST_FILE: no peer may connect",
            remedy="HCCL_WHITELIST_DISABLE=1, or name the file",
        )
    if values.get("HCCL_DETERMINISTIC", "").lower() == "strict" and values.get("INF_NAN_MODE_ENABLE") == "0":
        yield DeviceError("HCCL_DETERMINISTIC", "strict needs the INF/NaN mode", remedy="unset INF_NAN_MODE_ENABLE")
    if values.get("TORCH_TRANSFER_TO_NPU", "0") not in ("0", ""):
        yield DeviceError(
            "TORCH_TRANSFER_TO_NPU",
            "rewrites torch.cuda for every library of the process",
            remedy="unset it: crosstune names the NPU itself",
        )
    event, execution = values.get("HCCL_EVENT_TIMEOUT", "0"), values["HCCL_EXEC_TIMEOUT"]
    if _number(event) and _number(event) <= _number(execution):
        yield DeviceError(
            "HCCL_EVENT_TIMEOUT",
            f"{event} s, not more than HCCL_EXEC_TIMEOUT={execution}",
            allowed="more than it, or 0",
        )


def _meanings(values: Mapping[str, str]) -> Iterator[str]:
    """Values that are right and mean something else than they seem to."""
    limit = _number(values["HCCL_EXEC_TIMEOUT"])
    if limit == 0:
        yield "HCCL_EXEC_TIMEOUT=0: a collective that waits for a dead rank waits for ever"
    elif limit % 68:
        rounded = max(68, int(limit) // 68 * 68)
        yield f"HCCL_EXEC_TIMEOUT={values['HCCL_EXEC_TIMEOUT']}: chips before the 910B take {rounded} s (times of 68 s)"
    if values.get("HCCL_OP_EXPANSION_MODE") == "AIV" and values.get("HCCL_DETERMINISTIC", "false").lower() != "false":
        yield "HCCL_OP_EXPANSION_MODE=AIV may not take effect: HCCL_DETERMINISTIC goes first"


def _number(text: str) -> float:
    """The number, or 0 where it is none, which `_check_values` has said already."""
    return float(text) if text.replace(".", "", 1).isdecimal() else 0.0
