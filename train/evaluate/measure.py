"""Measures one model on a list of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from configs.schema.outputs import EvalConfig
from train.data.images import ImageInputs
from train.evaluate.generate import Measured, has_plain_cache, measure_batch, measure_batch_plainly
from train.evaluate.samples import Sample, batches
from train.evaluate.scores import Answer
from train.evaluate.with_images import measure_with_images

Note = Callable[[str], None]


@dataclass
class Ruler:
    """What stays the same between the models that are compared: tokenizer, lengths, where to compute.

    Args:
        cfg: the eval group.
        samples: the split; the longest reference sets the longest answer.
        tokenizer: turns answers into text.
        device: where the models are put.
        on_note: what the user should know.
        on_progress: called with (samples done, samples in all) after each batch.
        images: makes the inputs of the samples' images; None: the data has none.
    """

    cfg: EvalConfig
    samples: Sequence[Sample]
    tokenizer: Any
    device: torch.device
    on_note: Note = print
    on_progress: Callable[[int, int], None] | None = None
    images: ImageInputs | None = None

    @property
    def max_new_tokens(self) -> int:
        """Longest answer in tokens, its end token included; 0: nothing is generated."""
        answerable = [len(s.answer) for s in self.samples if s.has_prompt]
        if not self.cfg.generate or not answerable:
            return 0
        return self.cfg.max_new_tokens or max(answerable) + 1

    def measure(
        self, model: Any, samples: Sequence[Sample] | None = None, keep_logits: bool = False
    ) -> tuple[list[Answer], list[Measured]]:
        """Answers and likelihood of a model, in the order of the samples.

        Args:
            model: in evaluation mode, on `device`.
            samples: some of the split; None: all.
            keep_logits: keep the logits of each answer's first token.
        """
        samples = self.samples if samples is None else samples
        batch_fn: Callable[..., list[Measured]] = measure_batch
        if not has_plain_cache(model):
            self.on_note(f"{type(model).__name__}: no plain key-value cache, so prompts are read twice (slower)")
            batch_fn = measure_batch_plainly
        if self.images is not None:
            batch_fn = partial(measure_with_images, images=self.images)
        stop = self._stop_ids(model)
        measured: dict[int, Measured] = {}
        for with_prompt in (True, False):
            chosen = [i for i, s in enumerate(samples) if s.has_prompt == with_prompt]
            longest = self.max_new_tokens if with_prompt else 0
            for batch in batches([samples[i] for i in chosen], self.cfg.batch_tokens):
                indices = [chosen[j] for j in batch]
                results = batch_fn(model, [samples[i] for i in indices], stop, longest, self.device, keep_logits)
                measured.update(zip(indices, results, strict=True))
                if self.on_progress:
                    self.on_progress(len(measured), len(samples))
        ordered = [measured[i] for i in range(len(samples))]
        return [self._answer(s, m) for s, m in zip(samples, ordered, strict=True)], ordered

    def _answer(self, sample: Sample, measured: Measured) -> Answer:
        return Answer(
            id=sample.id,
            prompt=self.tokenizer.decode(sample.prompt),
            reference=self._text(sample.answer),
            answer=None if measured.answer_ids is None else self._text(measured.answer_ids),
            nll=measured.nll,
            tokens=len(sample.targets),
        )

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def _stop_ids(self, model: Any) -> set[int]:
        """Every id that ends an answer by the model's or the tokenizer's own word."""
        ids: set[int] = set()
        for source in (model.generation_config.eos_token_id, self.tokenizer.eos_token_id):
            ids.update(source if isinstance(source, list) else [] if source is None else [source])
        return ids
