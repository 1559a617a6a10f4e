"""TRL's SFTTrainer on CPU, in a virtual environment of its own.

    python trl_sft.py SPEC.json

``mode`` of the spec: ``padded``; ``padding_free`` (a batch's samples end to end, positions that begin anew;
with ``, halves``: in two passes of half the samples each, whose gradients add up); ``bfd``
(packed by best-fit decreasing, which implies padding_free); ``wrapped`` (rows cut from one stream of tokens). Dataset
preparation, collator, loss and loop are TRL's; only the order of the batches is given, so that all train on the same
samples. Whether a mode lets a sample see another in its row is tried on the real model after the timing.
"""

from __future__ import annotations

import tempfile
import time
from itertools import pairwise
from typing import Any

import common
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

PACKED = ("bfd", "wrapped")


class Ordered(SFTTrainer):  # type: ignore[misc]
    """Takes its batches in a given order; all else is TRL's."""

    order: list[list[int]]

    def get_train_dataloader(self) -> Any:
        """Batches by index, through TRL's own collator."""
        return DataLoader(self.train_dataset, batch_sampler=self.order, collate_fn=self.data_collator)


class Clock(TrainerCallback):  # type: ignore[misc]
    """From the end of a step to the end of the next: making the batch is part of it."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.began = self.first_step_at = 0.0
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())
        self.first_step_at = self.first_step_at or time.time()

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def main() -> None:
    """Trains and says how long each step took."""
    given, clock = common.spec(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(given, folder, clock)
        trainer.order = order(given, trainer.train_dataset)
        trainer.args.max_steps = len(trainer.order) // passes(given["mode"])
        trainer.train()
    peak = common.peak_rss_gib()  # before the leak is looked for
    each = passes(given["mode"])
    steps = [sum(trainer.order[at : at + each], []) for at in range(0, len(trainer.order), each)]
    begins = [clock.began, *clock.ends[:-1]]
    rows = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    common.answer(
        step_seconds=[end - begin for begin, end in zip(begins, clock.ends, strict=True)],
        step_tokens=[sum(rows[i] for i in batch) for batch in steps],
        losses=clock.losses,
        first_step_at=clock.first_step_at,
        peak_rss_gib=peak,
        leak=leak(trainer, given),
    )


def build(given: dict[str, Any], folder: str, clock: Clock) -> Ordered:
    """The trainer in the spec's mode; gradient checkpointing off, since it costs time and memory is not short."""
    mode = given["mode"]
    samples = [sample for step in given["steps"] for sample in step]
    if mode in PACKED:  # packing mixes the samples of all steps, so the warm-up repeats some of the timed ones
        samples = [sample for step in given["steps"][given["warmup"] :] for sample in step]
    rows = {"input_ids": [sample["ids"] for sample in samples], "labels": [common.labels(s) for s in samples]}
    length = given["batch_tokens"] if mode in PACKED else None
    args = SFTConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=True,
        learning_rate=given["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=len(given["steps"]),
        per_device_train_batch_size=8,
        gradient_checkpointing=False,
        packing=mode in PACKED,
        packing_strategy=mode if mode in PACKED else "bfd",
        padding_free=mode.startswith("padding_free"),
        gradient_accumulation_steps=passes(mode),
        max_length=length,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    dtype = torch.bfloat16 if given["weights"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=dtype)
    lora = LoraConfig(r=given["rank"], lora_alpha=given["alpha"], target_modules=common.TARGETS)
    return Ordered(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(given["model"]),
        peft_config=lora if given["tuning"] == "lora" else None,
        callbacks=[clock],
    )


def order(given: dict[str, Any], dataset: Any) -> list[list[int]]:
    """Indices of each batch. Packed rows are as long as a step, so that each is a batch; the first ones come twice."""
    if given["mode"] in PACKED:
        rows = list(range(len(dataset)))
        return [[row] for row in rows[: given["warmup"]] + rows]
    batches, at = [], 0
    for step in given["steps"]:
        cuts = [at + len(step) * part // passes(given["mode"]) for part in range(passes(given["mode"]) + 1)]
        batches += [list(range(*pair)) for pair in pairwise(cuts)]
        at += len(step)
    return batches


def passes(mode: str) -> int:
    """Batches whose gradients make a step."""
    return 2 if mode.endswith("halves") else 1


@torch.no_grad()
def leak(trainer: Ordered, given: dict[str, Any]) -> float:
    """Largest change of a logit of a sample when the sample before it is another one; logits are of the order of 10."""
    first, second = ({"ids": s["ids"][:64], "spans": []} for s in given["steps"][0][:2])
    other = {"ids": first["ids"][:1] + first["ids"][:0:-1], "spans": []}
    model, found = trainer.model.eval(), []
    for before in (first, other):
        rows = [before["ids"], second["ids"]]
        examples: list[dict[str, Any]] = [{"input_ids": ids, "labels": ids} for ids in rows]
        if given["mode"] in PACKED:
            whole = rows[0] + rows[1]
            examples = [{"input_ids": whole, "labels": whole}]
            if "seq_lengths" in trainer.train_dataset.column_names:
                examples[0]["seq_lengths"] = [len(ids) for ids in rows]
        batch = {name: value for name, value in trainer.data_collator(examples).items() if name != "labels"}
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = model(**batch, use_cache=False).logits
        size = len(second["ids"])
        found.append(logits_BTV[-1, :size] if len(logits_BTV) > 1 else logits_BTV[0, -size:])
    return float((found[0].float() - found[1].float()).abs().max())


if __name__ == "__main__":
    main()
