"""Puts the overlay on torch_npu in this process, and writes the report at its end."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import standin_overlay as overlay
import torch
import torch.distributed as dist

from configs.errors import EXIT_USER_FAULT
from launchers.doctor.standin.inside import fused_operators

DISPATCH_KEY = "PrivateUse1"
"""What PyTorch calls a device from outside: torch_npu's "npu"."""

TORCH_NPUS_OWN = frozenset(
    """
    empty.memory_format empty_strided empty_like new_empty_strided empty_with_format unsafe_empty_with_format
    empty_with_swapped_memory resize_ resize_as_ record_stream is_pinned _pin_memory get_storage_size
    view _reshape_alias as_strided as_strided_ unfold contiguous _lazy_clone _has_compatible_shallow_copy_type is_set_to
    set_ set_.source_Storage set_.source_Storage_storage_offset set_.source_Tensor
    copy_ _copy_from _copy_from_and_resize copy_memory_ _to_copy _local_scalar_dense _fused_sdp_choice
    """.split()
)
"""Operators that allocate, view or copy without a kernel of the device: torch_npu's own are what is tested.

`_to_copy` among them: on an NPU ``x.double()`` is a float32 tensor, with one warning."""


def put_on() -> None:
    """Replaces the kernels and HCCL; called once, when torch_npu has been imported."""
    own = registered(DISPATCH_KEY)
    for name in sorted(own):
        if replaceable(name):
            overlay.run_on_cpu(*split(name), False)
    without_kernel = sorted(missing(own))
    for name in without_kernel:
        overlay.run_on_cpu(*split(name), True)
    overlay.replace_memory_operators()
    for name in registered(f"Autograd{DISPATCH_KEY}"):
        if name.startswith("aten::"):
            overlay.restore_derivative(*split(name))
    dist.Backend._plugins["HCCL"] = dist.Backend._BackendPlugin(hccl, True)
    run_unqueued()
    fused_operators.install(overlay.uncounted)
    for name in unsupported():
        overlay.make_unsupported(*split(name))
    if folder := os.environ.get("CROSSTUNE_STANDIN_REPORT"):
        atexit.register(write_report, Path(folder), frozenset(without_kernel))


def registered(key: str) -> set[str]:
    """Operators with a kernel of their own for the dispatch key."""
    return set(torch._C._dispatch_get_registrations_for_dispatch_key(key))


def split(name: str) -> tuple[str, str]:
    """Name and overload."""
    operator, _, overload = name.partition(".")
    return operator, overload


def replaceable(name: str) -> bool:
    """Whether a kernel of torch_npu's is the device's, and PyTorch has one for the CPU."""
    namespace, _, short = name.partition("::")
    if namespace != "aten" or short in TORCH_NPUS_OWN or short.startswith(("npu_", "_npu_")):
        return False
    keys = ("CPU", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)


def missing(own: set[str]) -> Iterator[str]:
    """Operators that torch_npu hands to the CPU with a warning: no kernel of its own, nor one made of others."""
    composite = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    for name in registered("CPU") - own:
        if not any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in composite):
            yield name


def unsupported() -> Iterator[str]:
    """Operators of the setting, an operator without overload standing for all of its overloads."""
    wanted = [name for name in os.environ.get("CROSSTUNE_STANDIN_UNSUPPORTED", "").split(",") if name]
    every = torch._C._dispatch_get_all_op_names() if wanted else []
    for want in wanted:
        found = [name for name in every if name == want or name.partition(".")[0] == want]
        if not found:
            # No exception: torch, which is being imported, would bury it in tracebacks of its own and crash at the end.
            print(f"crosstune stand-in: unsupported: PyTorch has no operator '{want}'", file=sys.stderr, flush=True)
            os._exit(EXIT_USER_FAULT)
        yield from found


def hccl(options: Any, group_options: Any = None) -> Any:
    """What `init_process_group` and `new_group` call for the backend "hccl"."""
    gloo = dist.ProcessGroupGloo
    plain = gloo._Options()  # type: ignore[attr-defined]
    # All ranks are on this machine; gloo would else look up the host's name, which not every machine can.
    plain._devices = [gloo.create_device(hostname="127.0.0.1")]
    plain._timeout = options.timeout or timedelta(minutes=30)
    store = torch._C._distributed_c10d.PrefixStore("hccl/", options.store)
    return overlay.hccl(gloo(store, options.group_rank, options.group_size, plain))


def run_unqueued() -> None:
    """Operators here are done when their call returns, so torch_npu must not keep its own in a queue.

    By its function and not by TASK_QUEUE_ENABLE, which stays what the user set and what is recorded.
    """
    torch.npu.set_task_queue_enable(0)  # type: ignore[attr-defined]


def write_report(folder: Path, without_kernel: frozenset[str]) -> None:
    """Leaves ``<pid>.json``: what this process dispatched."""
    operators = overlay.operators()
    npu = torch.npu  # type: ignore[attr-defined]
    used = {name: {"count": count, "dtypes": sorted(dtypes)} for name, (count, dtypes) in operators.items()}
    fused = {
        name: {"count": count, "dtypes": sorted(fused_operators.DTYPES[name])}
        for name, count in fused_operators.CALLS.items()
    }
    report = {
        "rank": int(os.environ["RANK"]) if "RANK" in os.environ else None,
        "devices": [npu.get_device_name(index) for index in range(npu.device_count())],
        "operators": used | fused,
        "collectives": overlay.collectives(),
        "cautions": sorted(without_kernel & operators.keys()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{os.getpid()}.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
