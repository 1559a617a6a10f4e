"""The obvious library calls for an export: peft's `merge_and_unload`, then `save_pretrained`.

python library_export.py SPEC.json
"""

from __future__ import annotations

import common
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Loads, merges and saves; the time is taken outside."""
    given = common.spec()
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=getattr(torch, given["dtype"]))
    merged = PeftModel.from_pretrained(model, given["adapter"]).merge_and_unload()
    merged.save_pretrained(given["out"], max_shard_size=given["shard_bytes"])
    if given["tokenizer"]:
        AutoTokenizer.from_pretrained(given["model"]).save_pretrained(given["out"])
    common.answer()


if __name__ == "__main__":
    main()
