"""Tiny random models and samples shared by the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

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


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = "the quick brown fox jumps over a lazy dog. which licence is this? apache mit bsd gpl 0123456789 :,-\n"


def save_tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Writes a byte-level BPE tokenizer with a ChatML template, pad == eos, of at most 300 tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([_TEXT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_tiny_model(folder: Path, family: str = "llama", *, seed: int = 0, **changes: object) -> Path:
    """A folder as a user has it: config, safetensors and tokenizer."""
    tokenizer = save_tiny_tokenizer(folder)
    tiny_model(family, seed=seed, vocab_size=len(tokenizer), **changes).save_pretrained(folder)
    return folder


def write_prepared(folder: Path, splits: dict[str, list[Sample]]) -> Path:
    """A folder of prepared data with exactly these samples, without what only people read."""
    entries = {}
    for name, samples in splits.items():
        shard = folder / name / "shard-00000.arrow"
        shard.parent.mkdir(parents=True)
        table = pa.table(
            {
                "input_ids": pa.array([s.input_ids for s in samples], pa.list_(pa.int32())),
                "spans": pa.array([s.spans.ravel() for s in samples], pa.list_(pa.int32())),
                "id": pa.array([s.id for s in samples], pa.string()),
            }
        )
        with pa.OSFile(str(shard), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        shards = [{"file": f"{name}/{shard.name}", "source": "tiny", "rows": len(samples)}]
        entries[name] = {"rows": len(samples), "shards": shards}
    (folder / "manifest.json").write_text(json.dumps({"format_version": 2, "kind": "samples", "splits": entries}))
    return folder
