"""Tiny random models and samples shared by the tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from train.data.prepared import Sample

_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
TINY_CONFIGS: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": True},
    # A window shorter than the samples, so that it matters.
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {},
}


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random fp32 model in eval mode whose logits differ clearly from token to token."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(_SHAPE | TINY_CONFIGS[family] | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def samples_of(
    lengths: Sequence[int], *, vocab_size: int, seed: int = 0, spans: list[list[list[int]]] | None = None
) -> list[Sample]:
    """Random samples; by default the second half of each is supervised."""
    rng = np.random.default_rng(seed)
    return [
        Sample(
            id=f"sample:{i}",
            input_ids=rng.integers(3, vocab_size, length, dtype=np.int32),
            spans=np.asarray(spans[i] if spans else [[max(1, length // 2), length]], np.int32),
        )
        for i, length in enumerate(lengths)
    ]
