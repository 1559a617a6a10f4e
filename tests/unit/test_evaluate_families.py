"""Likelihood and greedy answers of every family are those of the sample alone, without cache or padding.

DeepSeek V4 and MiniMax M3 are wrong with padding on the left, others share no cache: evaluation pads on the right, and
reads prompts of equal length where the cache is not plain.
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from tests.tiny_families import FAMILIES, build
from train.evaluate.generate import has_plain_cache, measure_batch, measure_batch_plainly
from train.evaluate.samples import Sample

QUICK = ("deepseek_v4", "minimax_m3_vl", "deepseek_v3", "qwen3_5")
PLAIN = (
    *("llama", "qwen2", "qwen3", "glm4_moe", "deepseek_v2", "deepseek_v3", "kimi_k25", "minimax_m2"),
    *("bailing_moe_v2", "bailingmm_moe_v2_lite"),
)
NEW = 6
CHOOSING = ("glm_moe_dsa", "deepseek_v32", "deepseek_v4", "glm5_next")
MANY_HEADS = {"index_n_heads": 32}
"""With few, ReLU leaves ties at zero, which top-k breaks by the row's width: the row alone would differ, too."""


def samples() -> list[Sample]:
    """Uneven, behind a beginning that all share."""
    rng, made = random.Random(0), []
    for i, (length, answer) in enumerate([(12, 6), (40, 9), (25, 3), (33, 20), (18, 8)]):
        ids = [*range(5, 15), *(rng.randrange(3, 300) for _ in range(length))]
        made.append(Sample(f"s{i}", ids, [(len(ids) - answer, len(ids))]))
    return made


@torch.inference_mode()
def alone(model, sample: Sample) -> tuple[float, list[int]]:
    logits = model(input_ids=torch.tensor([sample.input_ids]), use_cache=False).logits[0].float()
    targets = torch.tensor(sample.targets)
    nll = F.cross_entropy(logits[targets - 1], torch.tensor(sample.input_ids)[targets], reduction="sum")
    ids = list(sample.prompt)
    for _ in range(NEW):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in (2, sample.answer[-1]):
            break
        ids.append(token)
    return float(nll), ids[len(sample.prompt) :]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_a_batch_says_what_each_sample_alone_says(name):
    model = build(name, **(MANY_HEADS if name in CHOOSING else {}))
    assert has_plain_cache(model) == (name in PLAIN)
    measure = measure_batch if name in PLAIN else measure_batch_plainly
    for sample, found in zip(samples(), measure(model, samples(), {2}, NEW, torch.device("cpu")), strict=True):
        nll, answer = alone(model, sample)
        assert found.nll == pytest.approx(nll, rel=1e-5), sample.id
        assert found.answer_ids == answer, sample.id
