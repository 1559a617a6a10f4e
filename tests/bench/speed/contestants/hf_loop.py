"""The straightforward loop: transformers and peft, samples padded to the longest of their batch, autocast to bf16.

    python hf_loop.py SPEC.json

Weights are fp32, or bf16 where the spec says so (LoRA only: adapters stay fp32, which autocast multiplies in bf16).
"""

from __future__ import annotations

import time
from typing import Any

import common
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Trains and says how long each step took."""
    given = common.spec()
    pad_id = AutoTokenizer.from_pretrained(given["model"]).pad_token_id
    model = build(given)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given["lr"], weight_decay=0.0)
    seconds, losses, first_step_at = [], [], 0.0
    for samples in given["steps"]:
        started = time.perf_counter()
        batch = common.padded(samples, pad_id)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        first_step_at = first_step_at or time.time()
    common.answer(step_seconds=seconds, losses=losses, first_step_at=first_step_at, peak_rss_gib=common.peak_rss_gib())


def build(given: dict[str, Any]) -> Any:
    """The model, with adapters for LoRA, in training mode."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if given["weights"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=dtype)
    if given["tuning"] == "lora":
        lora = LoraConfig(r=given["rank"], lora_alpha=given["alpha"], target_modules=common.TARGETS)
        model = get_peft_model(model, lora)
    return model.train()


if __name__ == "__main__":
    main()
