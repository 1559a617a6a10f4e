"""Peak memory of real training runs against what was predicted before their first step: the error table.

python -m tests.bench.plan_memory [SMOLLM2_FOLDER] [--only WORD]

Each run is `crosstune train` in processes of its own, on random models of several families and shapes, and on
SmolLM2-135M where its folder is given. Measured is what the loop records (``peak_gib``): on a CPU rank 0's largest
resident set, the process itself and its libraries included. The last column leaves these out of both figures: how far
off the part is that depends on the config.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASE = "process: Python and libraries"
LLAMA = {"vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama-32M": {"family": "llama", **LLAMA, **HEADS, "tie_word_embeddings": True},
    "llama-571M": {
        "family": "llama",
        "vocab_size": 32000,
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 20,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "tie_word_embeddings": True,
    },
    "llama-wide-vocab": {"family": "llama", **LLAMA, **HEADS, "vocab_size": 64000, "num_hidden_layers": 2},
    "qwen3-deep": {"family": "qwen3", **LLAMA, **HEADS, "num_hidden_layers": 14, "vocab_size": 4000, "head_dim": 64},
    "moe": {
        "family": "qwen3_moe",
        **LLAMA,
        **HEADS,
        "num_hidden_layers": 4,
        "head_dim": 64,
        "moe_intermediate_size": 256,
        "num_experts": 16,
        "num_experts_per_tok": 2,
    },
}
"""Random models; ``family`` is transformers' model_type."""


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str
    words: str
    """Further words of the command."""

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.model} {self.words}"


RECOMPUTE = "activation_checkpointing=true"
CASES = [
    Case("llama-32M", "tuning=full model.precision=fp32"),
    Case("llama-32M", "tuning=full model.precision=bf16"),
    Case("llama-32M", f"tuning=full model.precision=fp32 {RECOMPUTE}"),
    Case("llama-32M", "tuning=lora model.precision=fp32"),
    Case("llama-32M", "tuning=full model.precision=fp32 sharding=zero1"),
    Case("llama-32M", "tuning=full model.precision=bf16 sharding=zero1"),
    Case("llama-32M", "tuning=full model.precision=fp32 sharding=zero2"),
    Case("llama-32M", "tuning=full model.precision=bf16 sharding=zero2"),
    Case("llama-32M", "tuning=full model.precision=fp32 sharding=zero2_offload"),
    Case("llama-32M", "tuning=full model.precision=fp32 sharding=zero3"),
    Case("llama-32M", "tuning=full model.precision=fp32 sharding=zero3_offload"),
    Case("llama-32M", "tuning=full model.precision=fp32 checkpoint.every=2"),
    Case("llama-32M", "tuning=full model.precision=fp32 sharding=zero1 nproc=2"),
    Case("llama-32M", "tuning=full model.precision=fp32 nproc=2"),
    Case("llama-32M", "tuning=full model.precision=fp32 sharding=zero2 nproc=2"),
    Case("llama-32M", "tuning=full model.precision=fp32 sharding=zero3 nproc=2"),
    Case("llama-32M", "tuning=lora model.precision=fp32 sharding=zero3 nproc=2"),
    Case("llama-wide-vocab", "tuning=full model.precision=fp32"),
    Case("llama-wide-vocab", "tuning=lora model.precision=bf16"),
    Case("qwen3-deep", "tuning=full model.precision=fp32"),
    Case("qwen3-deep", f"tuning=full model.precision=bf16 {RECOMPUTE}"),
    Case("qwen3-deep", "tuning=lora model.precision=fp32 sharding=zero2"),
    Case("moe", "tuning=lora model.precision=fp32"),
    Case("moe", "tuning=full model.precision=fp32"),
    Case("moe", "tuning=full model.precision=fp32 sharding=zero3 nproc=2"),
    Case("smol", "tuning=lora model.precision=bf16"),
    Case("smol", f"tuning=full model.precision=fp32 {RECOMPUTE}"),
    Case("smol", f"tuning=lora model.precision=fp32 sharding=zero2 {RECOMPUTE}"),
    Case("llama-571M", "tuning=lora model.precision=fp32"),
    Case("llama-571M", f"tuning=full model.precision=fp32 {RECOMPUTE}"),
]
COMMON = (
    "dataset.license=CC0-1.0 device=cpu max_length=384 micro_batch_tokens=384 batch_tokens=384 max_steps=3 "
    "checkpoint.every=0 too_long=truncate_right optim.lr=1e-4"
).split()
WITHIN = 0.10


def main(smollm2: Path | None = None, only: str = "") -> None:
    """Prints the table, a line a run as it ends."""
    cases = [case for case in CASES if only in case.name and (case.model != "smol" or smollm2)]
    errors, started = [], time.monotonic()
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as name:
        folder = Path(name).resolve()
        data = write_records(folder / "data.jsonl")
        print(f"{'predicted':>10} {'measured':>10} {'off':>6} {'without base':>13}  run", flush=True)
        for number, case in enumerate(cases):
            model = smollm2 if case.model == "smol" else make_model(folder / case.model, MODELS[case.model])
            assert model is not None
            errors.append(line(case, run(case, model, data, folder, number)))
        found = [error for error in errors if error is not None]
        good = sum(abs(error) <= WITHIN for error in found)
        print(
            f"plan_memory: {good} of {len(found)} within {WITHIN:.0%}; {len(cases) - len(found)} failed; "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )


def line(case: Case, plan: dict[str, Any]) -> float | None:
    """Prints one run; returns how far off the prediction was."""
    if "measured_peak_gib" not in plan:
        print(f"{'-':>10} {'-':>10} {'-':>6} {'-':>13}  {case.name}: {plan.get('fault', 'no prediction')}", flush=True)
        return None
    predicted, measured = plan["device_bytes"] / 2**30, plan["measured_peak_gib"]
    base = plan["parts"][BASE] / 2**30
    off, without = predicted / measured - 1, (predicted - base) / (measured - base) - 1
    print(f"{predicted:6.2f} GiB {measured:6.2f} GiB {off:+6.0%} {without:+13.0%}  {case.name}", flush=True)
    return float(off)


def run(case: Case, model: Path, data: Path, folder: Path, number: int) -> dict[str, Any]:
    """plan.json of a real run."""
    run_dir = folder / f"run-{number}"
    words = [f"model.path={model}", f"dataset.path={data}", f"cache_dir={folder / 'cache'}", f"run_dir={run_dir}"]
    command = [sys.executable, "-P", "-m", "launchers.cli", "train", *COMMON, *words, *case.words.split()]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        return {"fault": (done.stdout.strip().splitlines() or ["no output"])[-1]}
    plan: dict[str, Any] = json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))
    shutil.rmtree(run_dir)  # with its checkpoint, of 12 bytes a trained weight
    return plan


def make_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A random model with the tests' tokenizer; made once."""
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import save_tiny_model

    save_tiny_model(folder)
    values = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "max_position_embeddings": 2048}
    config = AutoConfig.for_model(shape["family"], **values, **{k: v for k, v in shape.items() if k != "family"})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write_records(path: Path, count: int = 24) -> Path:
    """Records that all are cut to `max_length`, so that every step is full."""
    words = "apache mit bsd gpl quick brown fox lazy dog licence which over jumps".split()
    text = " ".join(words[i * 7 % len(words)] for i in range(600))
    lines = [json.dumps({"prompt": "x", "completion": f"{text} {i}"}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    asked = sys.argv[1:]
    wanted = asked.pop(asked.index("--only") + 1) if "--only" in asked else ""
    folders = [Path(word) for word in asked if not word.startswith("--")]
    main(folders[0] if folders else None, wanted)
