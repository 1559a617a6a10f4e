"""Peak memory of a save, a resume and a resharding, against the size of the checkpoint: full tuning of a random Llama.

python -m tests.bench.checkpoint_memory [millions of parameters]

What counts is memory of the process itself (``RssAnon``), looked at every few milliseconds: pages of a mapped
checkpoint are the page cache's, which gives them up under pressure. Each case is a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

MILLIONS = 200
"""Parameters of the model by default: some 2.4 GB of weights and moments."""
LOOK_SECONDS = 0.005
CASES = {
    "save, synchronous": ("plain", "save", "synchronous"),
    "save, asynchronous": ("plain", "save", "asynchronous"),
    "save, auto": ("plain", "save", "auto"),
    "resume under the same engine": ("plain", "resume", ""),
    "resume under zero3": ("zero3", "resume", ""),
    "resume under zero2_offload": ("zero2_offload", "resume", ""),
}


def main(millions: int = MILLIONS) -> None:
    """Prints for each case what it takes on top of what the engine holds."""
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        for name, (engine, what, mode) in CASES.items():
            words = [sys.executable, "-P", "-m", "tests.bench.checkpoint_memory", "case", str(millions)]
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "2"}
            done = subprocess.run(
                [*words, engine, what, mode, folder], env=environment, stdout=subprocess.PIPE, text=True
            )
            if done.returncode == -signal.SIGKILL:
                print(f"checkpoint_memory: {name}: killed, this machine's memory does not hold it", flush=True)
                continue
            done.check_returncode()
            found = json.loads(done.stdout.splitlines()[-1])
            if "refused" in found:
                print(f"checkpoint_memory: {name}: {found['refused']}", flush=True)
                continue
            size, held, more = (found[key] / 2**30 for key in ("checkpoint", "held", "more"))
            print(
                f"checkpoint_memory: {name}: {more:.2f} GiB more than the {held:.2f} GiB held, for a checkpoint of "
                f"{size:.2f} GiB: {more / size:.2f} of it",
                flush=True,
            )


def case(millions: int, sharding: str, what: str, mode: str, folder: Path) -> None:
    """One measurement; its figures are the last line of the output."""
    from configs.compose import build, compose
    from configs.errors import OutOfMemoryError
    from configs.schema.outputs import CheckpointConfig, SaveMode, Storage
    from train.checkpoint.checkpointer import Checkpointer
    from train.checkpoint.layout import TrainerState
    from train.checkpoint.restore import restore
    from train.checkpoint.retention import latest
    from train.devices.base import Device
    from train.engine.base import Engine, World

    cfg = compose("train", ["model.path=.", "dataset.path=.", "device=cpu", "device.threads=2", f"sharding={sharding}"])
    device = build(cfg.device, Device)
    device.activate(0)
    world = World()
    with closing(
        build(
            cfg.sharding,
            Engine,
            model_of(millions),
            optim=cfg.optim,
            device=device,
            world=world,
            working_dtype=torch.float32,
        )
    ) as engine:
        if what == "resume":
            with peak() as figures:
                restore(engine, latest(folder), world)
        else:
            for fragment in engine.fragments(owned=False):
                fragment.make_state(["master", "exp_avg", "exp_avg_sq"], {"step": {"value": 1.0, "tensor": True}})
                for kind in ("exp_avg", "exp_avg_sq"):
                    fragment.view(kind).normal_()
            keep = CheckpointConfig(mode=SaveMode(mode), every=1, keep_last=1)
            saver = Checkpointer(engine, folder, keep, world, storage=Storage.shared, run_id="", note=print)
            with closing(saver), peak() as figures:
                before = figures["held"]
                try:
                    saver.save(TrainerState(1, 0, 0, 0, 0), {})
                    saver.wait()
                except OutOfMemoryError as error:
                    print(json.dumps({"refused": str(error)}))
                    return
            figures["more"] += figures["held"] - before  # the copy stays for the next save
            figures["held"] = before
    figures["checkpoint"] = sum(file.stat().st_size for file in latest(folder).iterdir())
    print(json.dumps(figures))


def model_of(millions: int) -> torch.nn.Module:
    """A Llama of about so many parameters, in layers of 33 million."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=3072,
        num_hidden_layers=max(1, round((millions - 17) / 33)),
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


@contextmanager
def peak() -> Iterator[dict[str, Any]]:
    """Bytes that the process holds before or after, whichever is more (a resume makes the moments), and its excess."""
    figures: dict[str, Any] = {"held": anonymous_bytes()}
    most = [0]
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            most.append(max(most.pop(), anonymous_bytes()))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield figures
    figures["held"] = max(figures["held"], anonymous_bytes())
    over.set()
    thread.join()
    figures["more"] = max(0, most[0] - figures["held"])


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        size, engine_name, what_to_do, save_mode, where = sys.argv[2:]
        case(int(size), engine_name, what_to_do, save_mode, Path(where))
    else:
        main(*map(int, sys.argv[1:]))
