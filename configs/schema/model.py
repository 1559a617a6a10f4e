"""The model group: where weights and tokenizer come from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from configs.errors import ConfigError

HUB_PREFIX = "hf://"
"""Begins a path that asks the hub; no other path asks a network."""


class Precision(Enum):
    """Number format of the working weights. Masters and optimizer state are always fp32."""

    auto = "auto"
    """bf16 where the device multiplies it fast, else fp32; the choice is logged."""
    bf16 = "bf16"
    fp32 = "fp32"


@dataclass
class ModelConfig:
    """A causal language model: a local folder, or a hub id written ``hf://org/name``."""

    path: str = MISSING
    """Folder with config.json, safetensors and tokenizer; or ``hf://org/name``, the only form that asks a network."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    gguf_package: str | None = None
    """Installed Python package that ships a GGUF file; it is dequantised once into ``path`` (a folder of ours)."""
    precision: Precision = Precision.auto
    trust_remote_code: bool = False
    """Runs Python that comes with the model. Off unless you have read that code."""

    def __post_init__(self) -> None:
        if self.revision is not None and not self.path.startswith(HUB_PREFIX):
            raise ConfigError(
                "model.revision",
                f"'{self.revision}' with the local path '{self.path}'",
                allowed="a revision only with model.path=hf://org/name",
                remedy="remove model.revision, or name the hub model",
            )
        if self.gguf_package is not None and ("/" in self.path or self.path.startswith((".", "~"))):
            raise ConfigError(
                "model.path",
                f"'{self.path}', but the chosen model is made from the package {self.gguf_package}",
                allowed="with model.gguf_package: a plain name, that of the converted model",
                remedy=f"model=custom model.path={self.path} takes the folder",
            )


@dataclass
class ClosedModelConfig(ModelConfig):
    """A system whose weights nobody outside has: it answers with what is true and with the nearest open model."""

    path: str = "closed"
    title: str = ""
    """As people call it."""
    publisher: str = ""
    does: str = ""
    """What people use it for."""
    nearest: str = ""
    """Open models for that, with their hub names."""

    def __post_init__(self) -> None:
        raise ConfigError(
            "model",
            f"{self.title} is a service of {self.publisher} ({self.does}): its weights are not published, so nobody "
            "else can fine-tune it",
            allowed=f"open models for the same work: {self.nearest}",
            remedy="model=custom model.path=FOLDER (or hf://org/name) with one of them",
        )
