"""Dequantises a GGUF file into a folder of safetensors, as a process of its own: ``python -m train.models.gguf``.

Its own process, because the conversion holds the model twice and imports libraries that settle on an accelerator
before the run has chosen one.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from configs.errors import ModelError


def dequantise(gguf: Path, folder: Path) -> None:
    """Writes fp32 safetensors, tokenizer and template of `gguf` to `folder`.

    Costs about twice the fp32 model in memory while it runs.

    Raises:
        ModelError: the file does not convert.
    """
    command = [sys.executable, "-P", "-m", __name__, str(gguf), str(folder)]
    # The libraries ask for an accelerator when they are imported; this process uses none.
    done = subprocess.run(command, env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ModelError(str(gguf), f"does not convert: {last}", remedy="name a model folder with model.path=...")


def _convert(gguf: Path, folder: Path) -> None:
    import gguf as library
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers 5.23 reads the file three times, and makes the table of names anew for each module: half of the time.
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(library, name, functools.cache(getattr(library, name)))
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, local_files_only=True)
    # Without dequantize=True the model calls itself quantised and save_pretrained refuses it.
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
    )
    model.save_pretrained(folder)
    # A GGUF knows no limit and transformers then writes 1e30.
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
