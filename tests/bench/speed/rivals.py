"""The virtual environment of TRL, made once; and which contestants there are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.bench.speed.machine import BUILD

TRL, TORCH, TRANSFORMERS, PEFT = "1.16.0", "2.13.0", "5.23.0", "0.21.2"
"""TRL's newest when this was written; the others as crosstune has them, so that TRL is measured and not a library."""
INSTALL_SECONDS = 1200


@dataclass(frozen=True)
class Contestant:
    """One way to train."""

    name: str
    script: str = ""
    """Of the folder contestants; empty: crosstune's command."""
    weights: str = "fp32"
    """Of the base while it trains; the products are bf16 for all."""
    mode: str = "padded"
    tunings: tuple[str, ...] = ("lora", "full")
    in_quick: bool = False
    once: bool = False
    """Variants are measured in the first round only."""


CONTESTANTS = (
    Contestant("crosstune", in_quick=True),
    Contestant("transformers+peft", "hf_loop", in_quick=True),
    Contestant("transformers+peft, bf16 weights", "hf_loop", weights="bf16", tunings=("lora",), once=True),
    Contestant("TRL", "trl_sft", tunings=("full",)),
    Contestant("TRL", "trl_sft", weights="bf16", tunings=("lora",)),
    Contestant("TRL padding_free", "trl_sft", mode="padding_free", tunings=("full",), in_quick=True),
    Contestant("TRL padding_free", "trl_sft", weights="bf16", mode="padding_free", tunings=("lora",), in_quick=True),
    Contestant(
        "TRL padding_free, in two halves",
        "trl_sft",
        weights="bf16",
        mode="padding_free, halves",
        tunings=("lora",),
        once=True,
    ),
    Contestant("TRL padding_free, in two halves", "trl_sft", mode="padding_free, halves", tunings=("full",), once=True),
    Contestant("TRL packing bfd", "trl_sft", weights="bf16", mode="bfd", tunings=("lora",), once=True),
    Contestant("TRL packing wrapped", "trl_sft", weights="bf16", mode="wrapped", tunings=("lora",), once=True),
)
"""bf16 weights are TRL's best for LoRA, whose base does not move. For full fine-tuning they would have no fp32 masters,
which all others here keep: there its weights are fp32 under autocast."""


def trl_python() -> str | None:
    """Interpreter of TRL's environment, installed if need be; None, and why is printed, if that fails."""
    folder = BUILD / f"trl-{TRL}"
    python = folder / "bin" / "python"
    if (folder / "installed").is_file():
        return str(python)
    if folder.is_dir() and _has_trl(python):
        (folder / "installed").touch()
        return str(python)
    print(f"  installing TRL {TRL} into {folder} (2 GB)", flush=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for words in (
            [sys.executable, "-m", "venv", str(folder)],
            [*install, f"torch=={TORCH}"],  # first: its build is the machine's choice
            [*install, f"transformers=={TRANSFORMERS}", f"trl=={TRL}", f"peft=={PEFT}"],
        ):
            subprocess.run(words, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        print(f"  TRL does not install, the bench goes on without it: {said[-1]}", flush=True)
        return None
    (folder / "installed").touch()
    return str(python)


def _has_trl(python: Path) -> bool:
    words = [str(python), "-c", f"import importlib.metadata as m; assert m.version('trl') == '{TRL}'"]
    return python.exists() and subprocess.run(words, capture_output=True).returncode == 0
