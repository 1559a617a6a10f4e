"""The plan on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.schema.plan import PlanConfig
from launchers.doctor.page import Page

EDGE = 42
GOOD, BAD, DIM = "green", "bold red", "yellow"


def show(result: Mapping[str, Any], cfg: PlanConfig, page: Page) -> None:
    """Prints the result of `launchers.plan.command.plan`."""
    from train.units import in_gib

    share = result["trained"] / result["parameters"]
    page.head(
        f"plan for {_count(result['processes'], 'process', 'es')}",
        f"{result['family']}, {result['parameters']:,} parameters, {result['trained']:,} train ({share:.2%}); "
        f"{result['precision']} on {result['device'] if result['on_cpu'] else 'an accelerator'}",
    )
    where = "memory of a process" if result["on_cpu"] else "device memory of a rank, as torch reserves it"
    page.head(f"\n{where}", in_gib(result["device_bytes"]), "bold")
    _sizes(page, result["parts"])
    if result["beside_bytes"]:
        page.head("\nbeside it on the device", in_gib(sum(result["beside_bytes"].values())), "bold")
        _sizes(page, result["beside_bytes"])
    machine = result["per_machine"]
    page.head(
        f"\nhost memory of a machine, {_count(machine['processes'], 'process', 'es')}",
        in_gib(machine["host_bytes"]),
        "bold",
    )
    _sizes(page, {name: machine["processes"] * size for name, size in result["host_parts"].items()})
    page.head("\ndisk")
    page.row("a checkpoint", in_gib(result["checkpoint_bytes"]), indent=EDGE)
    kept = result["checkpoints_kept"]
    text = f"{kept} at once: {in_gib(kept * result['checkpoint_bytes'])}" if kept else "no bound: all, or many, stay"
    page.row("checkpoints kept", text, indent=EDGE)
    passes = _count(result["passes_per_step"], "pass", "es")
    page.head("\na step", f"{result['tokens_per_step']:,} tokens in {passes} of a rank")
    for name, size in result["sent_bytes"].items():
        page.row(name, f"{in_gib(size)} sent by each rank", indent=EDGE)
    speed = result["speed"]
    if "unknown" in speed:
        page.row("time", f"not known: {speed['unknown']}", indent=EDGE, label_style=DIM)
    else:
        page.row("time", f"{speed['step_seconds']:.2f} s, {speed['tokens_per_second']:,.0f} tokens/s", indent=EDGE)
        page.row(
            "", f"at {speed['flops'] / 1e12:,.2f} TFLOP/s a device: {speed['from']}; no wait for others", indent=EDGE
        )
    for text in result["unknown"]:
        page.row("estimated", text, label_style=DIM)
    for text in result["notes"]:
        page.row("note", text)
    if result["fits"] is not None:
        _fits(page, result, str(cfg.fit))


def _count(number: int, what: str, more: str) -> str:
    return f"{number} {what}{more if number != 1 else ''}"


def _sizes(page: Page, sizes: Mapping[str, int]) -> None:
    from train.units import in_gib

    for name, size in sorted(sizes.items(), key=lambda each: -each[1]):
        if size > 0:
            page.row(name, in_gib(size), indent=EDGE)


def _fits(page: Page, result: Mapping[str, Any], fit: str) -> None:
    from train.units import in_gib

    lines = result["fits"]
    found = sum(line["fits"] for line in lines)
    page.head(f"\nsettings for {fit}", f"{found} of {len(lines)} fit", GOOD if found else BAD)
    alone = {line.get("reason", "").rpartition(" alone exceeds")[0] for line in lines}
    if len(alone) == 1 and "" not in alone:
        page.row("too large", f"whatever the setting: {lines[0]['reason']}", label_style=BAD)
        return
    for line in lines:
        words = (
            f"sharding={line['sharding']} model.precision={line['precision']} "
            f"micro_batch_tokens={line['micro_batch_tokens']}"
            f"{' activation_checkpointing=true' if line['activation_checkpointing'] else ''}"
        )
        if line["needs_bytes"] is None:
            page.row("refused", f"{words}  {line['reason']}", label_style=BAD)
            continue
        size = f"{line['needs_bytes'] / 2**30:.1f} GiB"
        if line["fits"] and line["sharding"].endswith("offload") and not result["on_cpu"]:
            size += f", and {in_gib(line['machine_host_bytes'])} of a machine's host memory"
        why = "" if line["fits"] else f": {line['reason']}"
        page.row(
            "fits" if line["fits"] else "too large", f"{words}  {size}{why}", label_style=GOOD if line["fits"] else BAD
        )
