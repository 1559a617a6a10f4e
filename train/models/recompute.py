"""Layers that compute their activations again in the backward pass."""

from __future__ import annotations

from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from configs.errors import ConfigError


def recompute_activations(model: Any, every: int) -> None:
    """Has one of `every` layers of the language model recompute its activations; 0: none.

    Args:
        model: of transformers'.
        every: see `TrainConfig.recompute_every`.

    Raises:
        ConfigError: the model's own code cannot.
    """
    if not every:
        return
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except (ValueError, TypeError) as error:
        raise ConfigError(
            "activation_checkpointing", f"{type(model).__name__} cannot: {error}", remedy="leave it out"
        ) from error
    # Transformers' own choice of one in n counts a vision tower's blocks first.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = [each for each in (decoder or model).modules() if isinstance(each, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % every == 0
    # For reentrant checkpoints it makes the embeddings' output learn, and with it all below the lowest adapter.
    model.disable_input_require_grads()
