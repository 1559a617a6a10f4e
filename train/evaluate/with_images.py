"""Greedy answers and their likelihood of samples that show images, one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from train.data import prepared
from train.data.collate import collate
from train.data.images import ImageInputs
from train.data.plan import RowKind
from train.evaluate.generate import Measured, greedy, measure_batch_plainly, until_end
from train.evaluate.perplexity import token_nll
from train.evaluate.samples import Sample


@torch.inference_mode()
def measure_with_images(
    model: Any,
    samples: Sequence[Sample],
    stop: Collection[int],
    max_new_tokens: int,
    device: torch.device,
    keep_logits: bool = False,
    *,
    images: ImageInputs,
) -> list[Measured]:
    """As `measure_batch_plainly`, with the images that a sample shows; those without any are measured by that.

    Args:
        model: in evaluation mode, on `device`.
        samples: one batch.
        stop: token ids that end an answer, besides the last token of the sample's own reference.
        max_new_tokens: longest answer, its end token included; 0: generate nothing.
        device: where the model is.
        keep_logits: also give the first token's logits.
        images: makes the images' inputs.
    """
    measured = []
    for sample in samples:
        if not sample.images:
            measured += measure_batch_plainly(model, [sample], stop, max_new_tokens, device, keep_logits)
            continue
        spans = np.array(sample.spans, np.int32)
        row = prepared.Sample(sample.id, np.array(sample.input_ids, np.int32), spans, sample.images)
        batch = collate(((0,),), [row].__getitem__, kind=RowKind.single, device=device, images=images)
        given = batch.model_inputs()
        logits_NV = model(**given).logits.flatten(0, -2)
        result = Measured(float(token_nll(logits_NV, batch.targets_N).double().sum()), None)
        if keep_logits:
            result.first_logits_V = logits_NV[len(sample.prompt_targets)].float().cpu()
        if max_new_tokens:
            shown = _before_answer(sample, given, images)
            result.answer_ids = _answer(model, sample, shown, stop, max_new_tokens, images)
        measured.append(result)
    return measured


def _before_answer(sample: Sample, given: Mapping[str, Any], images: ImageInputs) -> dict[str, torch.Tensor]:
    """Of the sample's images those that the prompt shows; a turn behind the answer may have more."""
    tokens, patches, count = sample.prompt.count(images.image_token), 0, 0
    while tokens > 0:
        image = sample.images[count]
        tokens -= images.tokens(image.grid)
        patches += math.prod(image.grid)
        count += 1
    if not count:
        return {}
    return {"pixel_values": given["pixel_values"][:patches], "image_grid_thw": given["image_grid_thw"][:count]}


def _answer(
    model: Any,
    sample: Sample,
    shown: dict[str, torch.Tensor],
    stop: Collection[int],
    max_new_tokens: int,
    images: ImageInputs,
) -> list[int]:
    """What the model says after the prompt."""
    prompt = torch.tensor([sample.prompt], device=model.device)
    if shown and images.rotary_3d:  # from which generation works out positions in three dimensions
        shown = shown | {"mm_token_type_ids": (prompt == images.image_token).int()}
    ends = sorted({*stop, sample.answer[-1]})
    config = greedy(ends, sample.answer[-1], max_new_tokens)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config, **shown)
    return until_end(out.sequences[0, prompt.shape[1] :].tolist(), ends)
