"""Tiny models that see: folders with an image processor and a template, pictures, and records about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tests.tiny import save_tiny_tokenizer
from tests.tiny_families import build

SEEING = ("qwen3_5", "qwen3_5_moe", "kimi_k25")
IMAGE_TEXT = "<|image_pad|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MEAN = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 128, "longest_edge": 2048},
        **_MEAN,
    },
    "kimi": {
        "image_processor_type": "Kimi_K25ImageProcessor",
        "auto_map": {"AutoImageProcessor": "kimi_k25_vision_processing.KimiK25VisionProcessor"},
        "media_proc_cfg": {"patch_size": 14},
        "patch_size": 4,
        "merge_size": 2,
        "max_patches": 120,
        "size": {"max_height": 20, "max_width": 20},
        **_MEAN,
    },
}


def processor_of(name: str) -> dict[str, Any]:
    """What ``preprocessor_config.json`` of a tiny model says."""
    return PROCESSORS["kimi" if name == "kimi_k25" else "qwen"]


def save_seeing(name: str, folder: Path, *, weights: bool = True, **changes: Any) -> Path:
    """A folder as a user has it: config, safetensors, tokenizer with a template that shows images, processor."""
    tokenizer = save_tiny_tokenizer(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>", IMAGE_TEXT]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = build(name, **changes)
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TEXT)
    if weights:
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor_of(name)))
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over a slope, so that neither scaling nor a wrong place goes unseen."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 160, width * height).reshape(height, width, 1)
    return Image.fromarray((slope + rng.integers(0, 90, (height, width, 3))).astype(np.uint8))


SIZES = ((30, 21), (17, 44), (9, 8), (64, 64))
"""Width and height of the pictures of `write_records`."""


def write_records(folder: Path, count: int = 8, *, every: int = 2) -> Path:
    """``data.jsonl`` and its pictures: every so many rows one shows an image, the first of these two."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, size in enumerate(SIZES):
        picture(*size, seed=n).save(folder / f"{n}.png")
    rows = []
    for n in range(count):
        said = [{"type": "text", "text": f"question {n}?" + " really?" * (n % 3)}]
        if n % every == 0:
            said.insert(0, {"type": "image", "image": f"{n // every % len(SIZES)}.png"})
        if n == 0:
            said.append({"type": "image_url", "image_url": {"url": "3.png"}})
        answer = {"role": "assistant", "content": f"answer {n}" + ", the fox" * (n % 4)}
        rows.append({"messages": [{"role": "user", "content": said}, answer]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"
