"""The obvious library calls for figures of a model: padded batches for the perplexity, `generate` one by one.

python library_eval.py SPEC.json
"""

from __future__ import annotations

import math
import time

import common
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def main() -> None:
    """Seconds with the loading of the model, as crosstune's own are."""
    given = common.spec()
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    dtype = torch.bfloat16 if given["weights"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=dtype).eval()
    loaded = time.perf_counter()
    samples, nll, targets = given["samples"], 0.0, 0
    for at in range(0, len(samples), given["batch"]):
        batch = common.padded(samples[at : at + given["batch"]], tokenizer.pad_token_id)
        count = int((batch["labels"] != -100).sum())
        nll += model(**batch, use_cache=False).loss.item() * count
        targets += count
    measured = time.perf_counter()
    generated = 0
    for sample in samples if given["max_new_tokens"] else []:
        prompt = torch.tensor([sample["ids"][: sample["spans"][0][0]]])
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=given["max_new_tokens"],
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        generated += out.shape[1] - prompt.shape[1]
    common.answer(
        load_seconds=loaded - started,
        perplexity_seconds=measured - loaded,
        generate_seconds=time.perf_counter() - measured,
        perplexity=math.exp(nll / targets),
        generated_tokens=generated,
        peak_rss_gib=common.peak_rss_gib(),
    )


if __name__ == "__main__":
    main()
