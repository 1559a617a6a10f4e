"""A short all-reduce over all processes that a run would have, with a time of its own.

In a process of its own: ``python -P -m launchers.doctor.nodes.allreduce CONFIG BYTES SECONDS OUT``, with torchrun's
variables. A collective whose peer does not come may wait for ever in the driver, so the starting process ends it.

**Bandwidth** is what nccl-tests calls bus bandwidth: ``bytes / seconds * 2 (n - 1) / n`` for n ranks, which for a ring
is what goes through each rank's link, whatever n is. GB are 10^9 bytes. The best of `ROUNDS`.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from configs.errors import first_line
from launchers.doctor import bounded
from launchers.doctor.nodes.network import INTERFACES
from launchers.doctor.nodes.request import Request

ROUNDS = 5
LAST_SECONDS = 3.0
"""For the ranks' last signs of life: all give up at the same time, since they began together."""
LINGER_SECONDS = 1.0
ASKED_PER_SECOND = 2000
"""By all ranks together; a store answers some ten thousand."""
KILL_SECONDS = 15.0
"""Beyond its time, for a process to say itself what went wrong."""


def probe(request: Request, interface: str | None, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Runs this machine's processes of the probe.

    Args:
        request: what was asked.
        interface: for the collectives, where no variable chooses one; None: their own choice.
        environment: of the processes.

    Returns:
        ``{"gb_per_s", "silent": [ranks], "error": why | None}``: the slowest of this machine's ranks, the ranks that
        gave no sign, and the first fault.
    """
    # NFS keeps a name for what a process that cannot be killed has open: its folder cannot be removed.
    with tempfile.TemporaryDirectory(prefix="crosstune-doctor-", ignore_cleanup_errors=True) as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(request.config, encoding="utf-8")
        limit = request.allreduce_seconds
        words = [sys.executable, "-P", "-m", __name__, str(config), str(request.allreduce_bytes), str(limit)]
        outs = [Path(folder) / f"{local}.json" for local in range(request.nproc)]
        deadline = time.monotonic() + limit + KILL_SECONDS
        running = [
            bounded.start(
                [*words, str(out)],
                {**environment, **rank_variables(request, local, interface, environment)},
                out.with_suffix(bounded.MESSAGES),
            )
            for local, out in enumerate(outs)
        ]
        late = bounded.end(running, deadline)
        first = request.node * request.nproc
        results = [
            _failure("it did not end in time", silent=[first + local])
            if local in late
            else _result(running[local].returncode, out)
            for local, out in enumerate(outs)
        ]
    speeds = [each["gb_per_s"] for each in results]
    return {
        "gb_per_s": min(speeds) if all(speed is not None for speed in speeds) else None,
        "silent": sorted({rank for each in results for rank in each["silent"]}),
        "error": next((each["error"] for each in results if each["error"]), None),
    }


def rank_variables(
    request: Request, local: int, interface: str | None, environment: Mapping[str, str]
) -> dict[str, str]:
    """What torchrun would set."""
    names = {
        "RANK": request.node * request.nproc + local,
        "LOCAL_RANK": local,
        "WORLD_SIZE": request.nodes * request.nproc,
        "LOCAL_WORLD_SIZE": request.nproc,
        "MASTER_ADDR": request.master or "127.0.0.1",
        "MASTER_PORT": request.master_port,
    }
    found = {name: str(value) for name, value in names.items()}
    if interface:
        found |= {name: interface for name in INTERFACES if not environment.get(name)}
    return found


def _result(code: int, out: Path) -> dict[str, Any]:
    """What a process wrote, or how it ended."""
    with suppress(OSError, ValueError):
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return result
    return _failure(bounded.last_words(out.with_suffix(bounded.MESSAGES)) or f"exit code {code}", silent=[])


def main() -> None:
    """One rank; its result goes into the file."""
    config, size, seconds, out = sys.argv[1:]
    result = take_part(Path(config), int(size), float(seconds))
    Path(out).write_text(json.dumps(result), encoding="utf-8")
    # Threads of a collective that hangs would keep the process.
    sys.stdout.flush()
    os._exit(0)


def take_part(config: Path, size: int, seconds: float) -> dict[str, Any]:
    """Half of the time is for all ranks to come, half for the all-reduce; who gave no sign has a number in both."""
    from torch import distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    half = seconds / 2

    def store(*, serves: bool) -> Any:
        # torch's stubs do not list it among what the module exports, its documentation does.
        kind = dist.TCPStore  # type: ignore[attr-defined]
        return kind(master, port, world, serves, timedelta(seconds=half), wait_for_workers=False)

    try:
        roll = Roll(store(serves=rank == 0), rank, world)
        missing = roll.call("came", half)
        if missing:
            return _leave(roll, _failure("not all ranks came", silent=missing))
        # A connection of its own: an operation that hangs keeps the other one.
        second = store(serves=False)
        speed, error = _within(half, lambda: measure(config, second, size, half))
    except (RuntimeError, dist.DistError) as lost:
        return _failure(str(lost), silent=[0] if rank else [])
    try:
        # Who is gone; else who never got so far that the others could have met it.
        silent = roll.call("over", LAST_SECONDS) or roll.absent("active")
    except (RuntimeError, dist.DistError):
        silent = [0] if rank else []
    # A figure stands, whoever has left since.
    figure: dict[str, Any] = {"gb_per_s": speed, "silent": [], "error": None}
    return _leave(roll, figure if error is None else _failure(error, silent))


def _leave(roll: Roll, result: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's store ends with it, and the others still read there."""
    if roll.rank == 0:
        time.sleep(LINGER_SECONDS + roll.pause)
    return result


def _within(seconds: float, job: Callable[[], float]) -> tuple[float | None, str | None]:
    """What the job gave, or why it gave nothing; one that hangs is left behind."""
    ended: queue.Queue[tuple[float | None, str | None]] = queue.Queue()

    def run() -> None:
        try:
            ended.put((job(), None))
        except Exception as error:  # of any backend, in any way
            ended.put((None, str(error).strip() or type(error).__name__))

    threading.Thread(target=run, daemon=True).start()
    try:
        return ended.get(timeout=seconds + LAST_SECONDS)  # most backends give up by themselves, and say more
    except queue.Empty:
        return None, f"it did not end within {seconds:g} s"


class Roll:
    """Who has come so far, kept in the store of rank 0, which alone asks after each: n ranks send some n messages."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self.pause = min(1.0, max(0.05, world / ASKED_PER_SECOND))
        """Seconds between two looks of a rank."""

    def call(self, stage: str, seconds: float) -> list[int]:
        """Signs in, and waits for all; the ranks that had not come when rank 0 gave up, the same for everybody.

        Raises:
            RuntimeError: the store does not answer.
        """
        self.sign(stage)
        verdict = f"{stage}/missing"
        if self.store.add(f"{stage}/count", 1) == self.world:
            self.store.compare_set(verdict, "", "[]")
        deadline = time.monotonic() + seconds
        while not self.store.check([verdict]):
            left = deadline - time.monotonic()
            if left <= 0 and self.rank == 0:
                self.store.compare_set(verdict, "", json.dumps(self.absent(stage)))
            elif left <= -LAST_SECONDS:
                return [0]
            else:
                time.sleep(min(self.pause, left) if left > 0 else self.pause)
        missing: list[int] = json.loads(self.store.get(verdict))
        return missing

    def sign(self, stage: str) -> None:
        """Notes that this rank has come so far."""
        self.store.set(f"{stage}/{self.rank}", "1")

    def absent(self, stage: str) -> list[int]:
        """The ranks that have not, for rank 0; empty for the others."""
        if self.rank != 0:
            return []
        return [rank for rank in range(self.world) if not self.store.check([f"{stage}/{rank}"])]


def measure(config: Path, store: Any, size: int, seconds: float) -> float:
    """Bus bandwidth of an all-reduce of `size` bytes, in GB/s.

    Raises:
        RuntimeError: a peer was lost, or a sum came out wrong.
        CrosstuneError: the device cannot be used.
    """
    import torch
    from torch import distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    from configs.compose import build, load_resolved
    from train.devices.base import Device

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = build(load_resolved(config).device, Device)
    device.activate(int(os.environ["LOCAL_RANK"]))
    Roll(store, rank, world).sign("active")
    prefixed = PrefixStore("probe", store)
    dist.init_process_group(
        device.backend, store=prefixed, rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
    buffer = torch.ones(max(1, size // 4), dtype=torch.float32, device=device.torch_device)
    best = float("inf")
    for number in range(ROUNDS + 1):  # the first one connects
        buffer.fill_(1.0)
        device.synchronize()
        began = time.perf_counter()
        dist.all_reduce(buffer)
        device.synchronize()
        best = min(best, time.perf_counter() - began) if number else best
        if not bool((buffer == world).all()):
            raise RuntimeError(f"the sum of {world} ones came out as {buffer.min().item()} to {buffer.max().item()}")
    return buffer.numel() * 4 / best * 2 * (world - 1) / world / 1e9


def _failure(error: str, silent: list[int]) -> dict[str, Any]:
    return {"gb_per_s": None, "silent": silent, "error": first_line(error)[:300] or "no message"}


if __name__ == "__main__":
    main()
