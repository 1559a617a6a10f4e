"""What the values of Ascend's environment variables may be: one check per kind of value.

The allocator's keys and bounds were tried one by one on the torch_npu 2.13.0 wheel, since its documentation differs in
places (max_split_size_mb 20 is taken, page_size is ``1g`` and not ``1G``).

Not covered: which chip or CANN honours which value.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

Check = Callable[[str], str | None]
"""Takes a value; gives what is allowed if that value is not, else None."""

FOREVER = 2**31 - 1
"""HCCL's largest number of seconds."""


def whole(low: int, high: int | None = None, unit: str = "") -> Check:
    """A whole number in ``[low, high]``."""
    allowed = f"a whole number from {low} to {high:,}" if high is not None else f"a whole number, {low} or more"

    def check(value: str) -> str | None:
        fits = value.isdecimal() and low <= int(value) and (high is None or int(value) <= high)
        return None if fits else allowed + (f" {unit}" if unit else "")

    return check


def one_of(*values: str, any_case: bool = False) -> Check:
    """One of a few words."""

    def check(value: str) -> str | None:
        fits = value in values or (any_case and value.lower() in (word.lower() for word in values))
        return None if fits else ", ".join(values)

    return check


def seconds(value: str) -> str | None:
    """HCCL_EXEC_TIMEOUT: whole seconds, or hundredths where collectives are expanded on the device."""
    fits = re.fullmatch(r"\d+(\.\d{1,2})?", value) and float(value) <= FOREVER
    return None if fits else f"0 (waits for ever) to {FOREVER:,} seconds"


def folder(value: str) -> str | None:
    """A folder that exists."""
    return None if Path(value).is_dir() else "a folder that exists"


def visible_devices(value: str) -> str | None:
    """Device numbers; none at all hides every device."""
    numbers = [part.strip() for part in value.split(",")] if value.strip() else []
    fits = all(number.isdecimal() for number in numbers) and len(set(numbers)) == len(numbers)
    return None if fits else "device numbers, each once, with commas between them, such as 0,1,2,3"


def multiple_of_four(value: str) -> str | None:
    """HCCL_RDMA_TC: the lowest two bits of a traffic class are not used."""
    return None if value.isdecimal() and int(value) <= 255 and int(value) % 4 == 0 else "a multiple of 4 from 0 to 252"


def cpu_affinity(value: str) -> str | None:
    """CPU_AFFINITY_CONF: a mode (the wheel reads ``mode:`` before it too), then cores of single NPUs and switches."""
    mode, *parts = value.replace(" ", "").split(",")
    known = r"npu\d+:\d+-\d+|npu_affine:[01]|force:[01]|bind_irq[:=][01]"
    fits = re.fullmatch(r"(mode:)?[012]", mode) and all(re.fullmatch(known, part) for part in parts)
    return None if fits else "0, 1 or 2, then if needed cores such as npu0:0-9,npu1:10-19 or npu_affine:1"


def interfaces_of_hccl(value: str) -> str | None:
    """HCCL_SOCKET_IFNAME: prefixes (``eth,enp``), names (``=eth0``), or what not to use (``^eth``, ``^=eth0``)."""
    return None if matching_interfaces(value) else _interfaces("prefixes such as eth, names such as =eth0, or ^docker")


def interfaces_of_gloo(value: str) -> str | None:
    """GLOO_SOCKET_IFNAME: names."""
    here = psutil.net_if_addrs()
    return None if value and all(name in here for name in value.split(",")) else _interfaces("names")


def matching_interfaces(value: str) -> list[str]:
    """Interfaces of this machine that an HCCL_SOCKET_IFNAME stands for; none where it is malformed."""
    form = re.fullmatch(r"(\^?)(=?)([^\^=]+)", value)
    if form is None:
        return []
    without, exact, names = form[1] == "^", form[2] == "=", [name for name in form[3].split(",") if name]

    def meant(interface: str) -> bool:
        return any(interface == name if exact else interface.startswith(name) for name in names)

    return [interface for interface in psutil.net_if_addrs() if meant(interface) != without]


def _interfaces(grammar: str) -> str:
    return f"{grammar}; this machine has {', '.join(sorted(psutil.net_if_addrs()))}"


def address_here(value: str) -> str | None:
    """HCCL_IF_IP: an address of this machine."""
    try:
        wanted = ipaddress.ip_address(value)
    except ValueError:
        return "an IP address"
    # A scope (`fe80::1%eth0`) is no part of the address that HCCL is given.
    here = [entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries]
    return None if str(wanted) in here else "an address of this machine"


ON_OFF = one_of("0", "1")
TRUE_FALSE = one_of("true", "false", any_case=True)

ALLOCATOR: Mapping[str, Check | None] = {
    "max_split_size_mb": whole(20),
    "garbage_collection_threshold": lambda value: _fraction(value, low_too=False),
    "expandable_segments": one_of("True", "False"),
    "base_addr_aligned_kb": whole(0, 16),
    "page_size": one_of("1g"),
    "segment_size_mb": whole(20, 512),
    "large_segment_size_mb": whole(11),
    "per_process_memory_fraction": lambda value: _fraction(value, low_too=True),
    "pinned_mem_register": one_of("True", "False"),
    "pin_memory_expandable_segments": one_of("True", "False"),
    "pinned_use_background_threads": one_of("True", "False"),
    "multi_stream_lazy_reclaim": one_of("True", "False"),
    "release_lock_on_npumalloc": one_of("True", "False"),
    "throw_on_npumalloc_oom": one_of("True", "False"),
    "pinned_reserve_segment_size_mb": whole(0),
    "pinned_max_round_threshold_mb": whole(1),
    "pinned_max_cached_size_mb": whole(1),
    "max_non_split_rounding_mb": whole(20),
    "roundup_power2_divisions": None,
}
"""Keys of PYTORCH_NPU_ALLOC_CONF, and of PYTORCH_ALLOC_CONF, which torch_npu 2.13.0 reads as well."""


def _fraction(value: str, *, low_too: bool) -> str | None:
    try:
        fits = 0 <= float(value) <= 1 if low_too else 0 < float(value) < 1
    except ValueError:
        fits = False
    return None if fits else f"a number {'from 0 to 1' if low_too else 'between 0 and 1'}"


def allocator(value: str) -> str | None:
    """PYTORCH_NPU_ALLOC_CONF: ``key:value`` with commas between them; the wheel stops at any other key."""
    settings: dict[str, str] = {}
    # A list in brackets (`roundup_power2_divisions:[256:1,512:2]`) is one value.
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\])?", value.replace(" ", "")):
        key, colon, setting = part.partition(":")
        if key not in ALLOCATOR:
            near = difflib.get_close_matches(key, ALLOCATOR, n=1)
            return f"{near[0] if near else ', '.join(ALLOCATOR)} (there is no key '{key}')"
        check = ALLOCATOR[key]
        if not colon or (check is not None and check(setting)):
            return f"{key}:{check(setting) if check else 'a value'}"
        settings[key] = setting
    fixed = {"max_split_size_mb", "garbage_collection_threshold"} & settings.keys()
    if fixed and settings.get("expandable_segments") == "True":
        return f"expandable_segments:True, or {' and '.join(sorted(fixed))}, but not both"
    return None
