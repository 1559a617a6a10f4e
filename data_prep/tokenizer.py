"""The tokenizer of a model folder, its chat template, and hashes of both that name what prepared data depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tiktoken.model")
_OTHER_FILES = ("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
_NO_MATTER = {
    "tokenizer.json": ("padding", "truncation"),
    "tokenizer_config.json": (
        "backend", "chat_template", "is_local", "local_files_only", "model_max_length", "name_or_path", "padding_side",
        "pad_token", "processor_class", "transformers_version", "truncation_side",
    ),
}  # fmt: skip
"""Keys that change when a tokenizer is saved again, or that concern batching, but never the tokens of a text."""


def load_tokenizer(
    model_dir: Path, *, template: Path | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder; no network is asked.

    Args:
        model_dir: folder of a model.
        template: Jinja file that replaces the chat template; None: the folder's own, if it has one.
        trust_remote_code: run Python found in the folder.

    Raises:
        ModelError: the folder holds no tokenizer, or one that cannot be loaded, or `template` cannot be read.
    """
    _check_folder(model_dir)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the library raises whatever its parsers do
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(str(model_dir), f"its tokenizer cannot be loaded: {first}") from error
    tokenizer.chat_template = template_text(model_dir, template)
    return tokenizer


def template_text(model_dir: Path, template: Path | None = None) -> str | None:
    """The chat template that `load_tokenizer` sets: `template`, else the folder's own, else None.

    Raises:
        ModelError: `template` cannot be read.
    """
    if template is not None:
        try:
            return template.expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise ModelError(f"template.path={template}", f"cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ModelError(f"template.path={template}", f"is not UTF-8: {error.reason}") from error
    own = model_dir / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    config = model_dir / "tokenizer_config.json"
    found = _json(config).get("chat_template") if config.is_file() else None
    if isinstance(found, list):  # several templates by name
        found = next((t.get("template") for t in found if t.get("name") == "default"), None)
    return found


def template_sha256(text: str | None) -> str:
    """Hash of a chat template; of the empty text where there is none."""
    return hashlib.sha256((text or "").encode()).hexdigest()


def tokenizer_sha256(model_dir: Path) -> str:
    """Hash of what decides which tokens a text becomes; the same after the tokenizer was loaded and saved again.

    Raises:
        ModelError: there is no tokenizer.
    """
    _check_folder(model_dir)
    digest = hashlib.sha256()
    for name in (*_VOCABULARY_FILES, *sorted(path.name for path in model_dir.glob("*.tiktoken")), *_OTHER_FILES):
        path = model_dir / name
        if not path.is_file():
            continue
        data = path.read_bytes()
        if name in _NO_MATTER:
            kept = {k: v for k, v in _json(path).items() if k not in _NO_MATTER[name]}
            data = json.dumps(kept, sort_keys=True).encode()
        digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    return digest.hexdigest()


def _check_folder(model_dir: Path) -> None:
    if not model_dir.is_dir():
        raise ModelError(f"model.path={model_dir}", "no such folder")
    if not any((model_dir / name).is_file() for name in _VOCABULARY_FILES) and not list(model_dir.glob("*.tiktoken")):
        raise ModelError(
            str(model_dir),
            "the folder holds no tokenizer",
            allowed="tokenizer.json or another of " + ", ".join(_VOCABULARY_FILES[1:]),
            remedy="copy the tokenizer's files beside the weights",
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(str(path), f"cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}
