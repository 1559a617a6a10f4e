"""Ming-Flash-Omni 2.0 without its senses: the thinker, a Ling with one router more for images and one for audio.

Text alone takes the text router. Who has embeddings of images or audio passes `inputs_embeds` with `image_mask` and
`audio_mask` (video counts as image) and, for images, positions in time, height and width.
"""

# transformers is not typed for mypy: its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import can_return_tuple

from train.models.bailing_moe_v2.configuration_ming import BailingMM2Config
from train.models.bailing_moe_v2.modeling import BailingMoeV2ForCausalLM

CARRIED_OVER = ("vision.", "audio.", "linear_proj.", "linear_proj_audio.")
"""Prefixes of published weights that no module here has: both towers and what leads from them into the language model.
An export takes them from the base as they are. Talker and image generator lie in folders of their own."""


class BailingMM2NativeForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The thinker under the published names, ``model.model.layers`` and ``model.lm_head``."""

    config: BailingMM2Config
    config_class = BailingMM2Config  # the annotation alone is a string to transformers here
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BailingMoeV2DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = ["^" + prefix.replace(".", r"\.") for prefix in CARRIED_OVER]

    def __init__(self, config: BailingMM2Config) -> None:
        super().__init__(config)
        self.model = BailingMoeV2ForCausalLM(config.llm_config)
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # as its language model

    def get_input_embeddings(self) -> nn.Module:
        """Of the language model."""
        embeddings: nn.Module = self.model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Of the language model."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Head of the language model."""
        head: nn.Module = self.model.get_output_embeddings()
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Head of the language model."""
        self.model.set_output_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_mask: torch.Tensor | None = None,
        audio_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As `BailingMoeV2ForCausalLM.forward`.

        Args:
            input_ids: as there.
            attention_mask: as there.
            position_ids: as there.
            past_key_values: as there.
            inputs_embeds: as there.
            labels: as there.
            use_cache: as there.
            logits_to_keep: as there.
            image_mask: bool ``[b x t]``, the tokens of images and video; None: there are none.
            audio_mask: bool ``[b x t]``, the tokens of audio; None: there are none.
            kwargs: as there.
        """
        out: MoeCausalLMOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            image_mask=image_mask,
            audio_mask=audio_mask,
            **kwargs,
        )
        return out
