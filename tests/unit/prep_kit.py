"""Tokenizers, templates and configs for the tests of data preparation; no model package is needed."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from configs.schema.dataset import DatasetConfig, FilesDatasetConfig
from configs.schema.model import ModelConfig
from configs.schema.roots import PrepConfig

SPECIALS = ["<s>", "<|end|>", "<|start|>", "<|header|>", "</s>"]

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}{{ '<|start|>system\nBe kind.<|end|>\n' }}{% endif %}"
    "{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
CHINESE = (
    "{% set names = {'system': '系统', 'user': '用户', 'assistant': '助手', 'tool': '工具'} %}"
    "{% for m in messages %}{{ names[m['role']] + '：' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '助手：' }}{% endif %}"
)
_LINES = ["the answer is here", "\n\n\n\n", "    indented\n\n", "assistant user system\n\n", " , . ! ?", "12 34"] * 20


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """A small byte-level BPE that merges runs of line breaks and spaces; pad is the end token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(_LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@functools.cache
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A BPE that puts a space before every text, as SentencePiece models do."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *SPECIALS, *fallback], show_progress=False)
    core.train_from_iterator(_LINES, trainer)
    made = json.loads(core.to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] not in fallback]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
    )


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer with this chat template set."""
    tokenizer.chat_template = template
    return tokenizer


def model_folder(folder: Path, template: str | None = CHATML) -> Path:
    """A model folder that has a tokenizer and nothing else."""
    with_template(byte_level(), template).save_pretrained(folder)
    return folder


def prep_config(tmp_path: Path, dataset: DatasetConfig, **changes: object) -> PrepConfig:
    """A prep config with its cache under `tmp_path`."""
    cfg = PrepConfig(cache_dir=str(tmp_path / "cache"), model=ModelConfig(path="model"), dataset=dataset)
    for key, value in changes.items():
        setattr(cfg, key, value)
    return cfg


def write_jsonl(path: Path, rows: list[object]) -> Path:
    """Rows as JSON lines; a `bytes` row is written as it stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def files(path: Path | str, **settings: object) -> FilesDatasetConfig:
    """A files dataset."""
    return FilesDatasetConfig(path=str(path), **settings)  # type: ignore[arg-type]
