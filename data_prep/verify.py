"""Whether tokens decode to the text they are meant to stand for."""

from __future__ import annotations

import json
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPM_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class Verifier:
    """Compares tokens with texts.

    For the two common kinds of decoder the bytes of each token are known, and equal bytes settle it. Whatever differs
    goes through the tokenizer's own decoder, so the verdict is the same with and without the shortcut.

    Args:
        tokenizer: the model's.
        exact: a first space is compared, too; tokenizers that put a space before every text cannot have that.
        fast: use the shortcut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, exact: bool, fast: bool = True) -> None:
        self._tokenizer: Any = tokenizer
        self._exact = exact
        self._bytes = _token_bytes(tokenizer) if fast else None

    def difference(self, ids: list[int], text: str) -> str | None:
        """What `ids` decode to if that is not `text`; None if it is."""
        if self._bytes is not None and b"".join(map(self._bytes.__getitem__, ids)) == text.encode():
            return None
        decoded = self.decode(ids)
        return None if _same_text(decoded, text, exact=self._exact) else decoded

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class _TokenBytes(dict[int, bytes]):
    """Token id -> bytes, worked out when first asked for: most vocabularies are much larger than what occurs."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        found = self[token_id] = self._spelled(self._backend.id_to_token(token_id) or "")
        return found

    def _spelled(self, token: str) -> bytes:
        raise NotImplementedError


class _ByteLevelBytes(_TokenBytes):
    """Each character stands for a byte; a token with any other character stands for itself, as the decoder has it."""

    def _spelled(self, token: str) -> bytes:
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:
            return token.encode()


class _SentencePieceBytes(_TokenBytes):
    """``▁`` is a space, ``<0x0A>`` a byte."""

    def _spelled(self, token: str) -> bytes:
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()


def _token_bytes(tokenizer: Any) -> _TokenBytes | None:
    """The table for the tokenizer's decoder; None: the decoder is of another kind, or there is none to look at."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None or not tokenizer.is_fast:
        return None
    settings = json.loads(decoder.__getstate__())
    steps = settings.get("decoders", [settings])
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return _ByteLevelBytes(tokenizer.backend_tokenizer)
    replaced = [(s["pattern"], s["content"]) for s in steps if s["type"] == "Replace"]
    if "ByteFallback" in kinds and kinds <= _SPM_STEPS and all(r == ({"String": "▁"}, " ") for r in replaced):
        return _SentencePieceBytes(tokenizer.backend_tokenizer)
    return None


def _byte_of() -> dict[str, int]:
    """Character -> byte of byte-level BPE, from GPT-2: printable Latin-1 as it stands, the rest from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{chr(byte): byte for byte in shown}, **{chr(0x100 + n): byte for n, byte in enumerate(hidden)}}


_BYTE_OF = _byte_of()


def _same_text(decoded: str, expected: str, *, exact: bool) -> bool:
    """Equal but for Unicode composition, which some tokenizers normalise; SentencePiece drops a first space."""
    if decoded == expected:
        return True
    if not exact:
        decoded, expected = decoded.strip(), expected.strip()
    return unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", expected)
