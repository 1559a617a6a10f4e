"""The language model of Ling and Ring 2.x: grouped-query attention with half of a head rotated, fine-grained experts.

Parts that other families of transformers have to the letter are taken from there: norms, MLP, the group-limited sigmoid
router without auxiliary loss (arXiv:2412.19437, section 2.1.2) and the fused experts from DeepSeek V3; partial rotary
embedding from GLM-4.5.

Shapes: b rows, t tokens, h heads, k key-value heads, d dimensions of a head, r of them rotated.
"""

# transformers is not typed for mypy: its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Experts,
    DeepseekV3MLP,
    DeepseekV3RMSNorm,
    DeepseekV3TopkRouter,
)
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from train.models.bailing_moe_v2.configuration import BailingMoeV2Config


class BailingMoeV2RMSNorm(DeepseekV3RMSNorm):
    """Of the residual stream, and of each head's queries and keys."""


class BailingMoeV2MLP(DeepseekV3MLP):
    """Gated; of the first layers, and the experts that every token passes."""


class BailingMoeV2Experts(DeepseekV3Experts):
    """All routed experts of a layer in two tensors."""


class BailingMoeV2Router(DeepseekV3TopkRouter):
    """Chooses a token's experts, in fp32: those of the best groups by sigmoid score plus bias, weighted by score."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        self.norm_topk_prob = config.norm_topk_prob and self.top_k > 1
        if not config.moe_router_enable_expert_bias:  # then the folder has none
            self.e_score_correction_bias = nn.Buffer(torch.zeros(self.num_experts), persistent=False)


class BailingMoeV2MoE(nn.Module):
    """Routed experts beside shared ones."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__()
        self.experts = BailingMoeV2Experts(config)
        self.gate = BailingMoeV2Router(config)
        self.multi_router = config.router_type == "MultiRouter"
        if self.multi_router:
            self.image_gate = BailingMoeV2Router(config)
            self.audio_gate = BailingMoeV2Router(config)
        self.shared_experts = None
        if config.num_shared_experts:
            one = config.moe_shared_expert_intermediate_size or config.moe_intermediate_size
            self.shared_experts = BailingMoeV2MLP(config, intermediate_size=one * config.num_shared_experts)

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_mask: torch.Tensor | None = None,
        audio_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sum of what a token's experts say, ``[b x t x hidden]``.

        Args:
            hidden_states: ``[b x t x hidden]``.
            image_mask: ``[b x t]``, the tokens that the router for images sends; None: there are none.
            audio_mask: as `image_mask`, for audio.
        """
        _, weights, chosen = self.gate(hidden_states)
        if self.multi_router:
            for gate, mask in ((self.image_gate, image_mask), (self.audio_gate, audio_mask)):
                if mask is not None:
                    _, own_weights, own_chosen = gate(hidden_states)
                    here = mask.reshape(-1, 1)
                    weights, chosen = torch.where(here, own_weights, weights), torch.where(here, own_chosen, chosen)
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        routed: torch.Tensor = self.experts(flat, chosen, weights).view_as(hidden_states)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)


class BailingMoeV2RotaryEmbedding(Glm4MoeRotaryEmbedding):
    """Cosines and sines of the rotated dimensions; from three positions a token where the config has sections."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        sections = config.rope_parameters.get("mrope_section") if config.rope_parameters else None
        self.axes: list[int] | None = None
        if sections:
            # Frequencies go to height and width by turns, the last ones to time (0).
            space = sections[1] + sections[2]
            self.axes = ([1, 2] * space)[:space] + [0] * sections[0]

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of ``[b x t x r]``.

        Args:
            x: whose dtype and device they get.
            position_ids: ``[b x t]``, or ``[3 x b x t]`` for time, height and width.
        """
        cos, sin = super().forward(x, position_ids)
        if position_ids.dim() < 3:
            return cos, sin
        assert self.axes is not None, "positions in three dimensions need mrope_section in the config"
        axes = torch.tensor(self.axes * 2, device=cos.device)
        each = torch.arange(len(axes), device=cos.device)
        return cos[axes, ..., each].movedim(0, -1), sin[axes, ..., each].movedim(0, -1)


class BailingMoeV2Attention(nn.Module):
    """Grouped-query attention with one projection for queries, keys and values."""

    def __init__(self, config: BailingMoeV2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.heads) * self.head_dim, bias=config.use_qkv_bias)
        self.query_layernorm: nn.Module = nn.Identity()
        self.key_layernorm: nn.Module = nn.Identity()
        if config.use_qk_norm:
            self.query_layernorm = BailingMoeV2RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.key_layernorm = BailingMoeV2RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.dense = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends.

        Args:
            hidden_states: ``[b x t x hidden]``.
            position_embeddings: two of ``[b x t x r]``.
            attention_mask: as the attention implementation wants it.
            past_key_values: of the tokens before.
            kwargs: handed to the attention implementation.

        Returns:
            ``[b x t x hidden]``, and the weights if the implementation has them.
        """
        shape = hidden_states.shape[:-1]
        joint = self.query_key_value(hidden_states).view(*shape, -1, self.head_dim)
        query, key, value_BKTD = (part.transpose(1, 2) for part in joint.split(self.heads, dim=-2))
        query_BHTD, key_BKTD = apply_rotary_pos_emb(
            self.query_layernorm(query), self.key_layernorm(key), *position_embeddings
        )
        if past_key_values is not None:
            key_BKTD, value_BKTD = past_key_values.update(key_BKTD, value_BKTD, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out_BTHD, weights = attend(
            self,
            query_BHTD,
            key_BKTD,
            value_BKTD,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.dense(out_BTHD.reshape(*shape, -1)), weights


class BailingMoeV2DecoderLayer(GradientCheckpointingLayer):
    """Attention, then experts or, in the first layers, a dense MLP."""

    def __init__(self, config: BailingMoeV2Config, layer_idx: int) -> None:
        super().__init__()
        self.attention = BailingMoeV2Attention(config, layer_idx)
        self.routed = bool(config.num_experts) and layer_idx >= config.first_k_dense_replace
        self.mlp = BailingMoeV2MoE(config) if self.routed else BailingMoeV2MLP(config)
        self.input_layernorm = BailingMoeV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = BailingMoeV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_mask: torch.Tensor | None = None,
        audio_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``[b x t x hidden]``; `kwargs` go to attention, the masks to the routers."""
        attended, _ = self.attention(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        masks = {"image_mask": image_mask, "audio_mask": audio_mask} if self.routed else {}
        out: torch.Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), **masks)
        return out


class BailingMoeV2PreTrainedModel(PreTrainedModel):
    """What both heads share."""

    config: BailingMoeV2Config
    config_class = BailingMoeV2Config  # the annotation alone is a string to transformers here
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["BailingMoeV2DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _can_record_outputs = {
        "hidden_states": BailingMoeV2DecoderLayer,
        "attentions": OutputRecorder(BailingMoeV2Attention, index=1),
        "router_logits": OutputRecorder(BailingMoeV2Router, index=0, layer_name="mlp.gate"),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for the decorator in this file; the parent of our experts has it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, BailingMoeV2Router):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, BailingMoeV2Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


class BailingMoeV2Model(BailingMoeV2PreTrainedModel):
    """Without a head."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [BailingMoeV2DecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = BailingMoeV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = BailingMoeV2RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self._keys_to_ignore_on_load_unexpected = [rf"layers\.{index}\." for index in mtp_layers(config)]
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states, as every causal model of transformers.

        Args:
            input_ids: ``[b x t]``; or else `inputs_embeds`.
            attention_mask: ``[b x t]``, 1 for tokens; or as the attention implementation wants it.
            position_ids: ``[b x t]``, or ``[3 x b x t]`` for time, height and width.
            past_key_values: of the tokens before.
            inputs_embeds: ``[b x t x hidden]``.
            use_cache: keep the keys and values.
            kwargs: handed to the layers: `image_mask`, `audio_mask` and what the attention implementation reads.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        in_time = position_ids[0] if position_ids.dim() == 3 else position_ids
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=in_time,
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=in_time,
                past_key_values=past_key_values,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class BailingMoeV2ForCausalLM(BailingMoeV2PreTrainedModel, GenerationMixin):
    """With the head that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        self.model = BailingMoeV2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: as `BailingMoeV2Model.forward` has it.
            attention_mask: likewise.
            position_ids: likewise.
            past_key_values: likewise.
            inputs_embeds: likewise.
            labels: ``[b x t]``, -100 where nothing is learnt.
            use_cache: keep the keys and values.
            logits_to_keep: for which tokens: the last ones, some positions, or a bool mask ``[b x t]``.
            kwargs: as `BailingMoeV2Model.forward` has it.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def mtp_layers(config: BailingMoeV2Config) -> range:
    """Indices of the layers in a published folder that predict further tokens and are not built."""
    return range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
