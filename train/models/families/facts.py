"""The facts that the pipeline asks of a model family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layers:
    """Where a family computes the ops of `train/ops`: classes of one module of transformers, with that very formula.

    The formula is compared again before a layer is touched (`train/ops/replace.py`).
    """

    module: str
    rms_norm: str
    """A class with `weight` and `variance_epsilon`."""
    rotary: str
    """An attention class that calls its module's `apply_rotary_pos_emb`."""
    swiglu: str
    """A class with `gate_proj`, `up_proj`, `down_proj` and `act_fn`."""


@dataclass(frozen=True)
class Family:
    """Facts about one `config.model_type`.

    Names are those of transformers' modules. What can be read off a loaded model (parts kept in fp32, expert classes,
    whether there is a vision tower) is read there and not repeated here.
    """

    model_type: str
    title: str
    """As people call it."""
    attention: tuple[str, ...] | None
    """Last names of the projections of its attention, linear or softmax, without indexers and gates of a few rows.
    None: not known, and LoRA adapts every linear module but the head."""
    attention_parameters: tuple[str, ...] = ()
    """Last names of weights of its attention whose module is no plain linear one."""
    packed_mixers: tuple[str, ...] | None = ()
    """Classes of mixers that mix a row's samples unless they are wrapped (`train/ops/packed_mixers.py`); empty: softmax
    attention through transformers' attention interface only. None: not proven, so that a row holds one sample."""
    untrained: str | None = None
    """Pattern of parameters that no gradient of the language-model loss reaches."""
    untrained_reason: str = ""
    layers: Layers | None = None
    """None: its layers run as transformers wrote them, on every device."""
    turns_by_length: tuple[str, int] | None = None
    """Of one model: the type of its rotary embedding if that turns all samples of a pass by the longest one's length,
    once that is above so many tokens."""

    @property
    def listed(self) -> bool:
        """Whether anything is known of it."""
        return self.attention is not None

    @property
    def packing_exact(self) -> bool:
        """Proven by test: logits and gradients of a packed row equal those of its samples alone."""
        return self.packed_mixers is not None

    @classmethod
    def unlisted(cls, model_type: str) -> Family:
        """The safe path: rows of one sample, padded on the right, and all linear modules for LoRA."""
        return cls(model_type, title=model_type, attention=None, packed_mixers=None)
