"""Config of Ling and Ring 2.x, with the published keys and defaults."""

# transformers is not typed for mypy: its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from train.models.bailing_moe_v2 import ARCHITECTURE, SHARED_TYPE

VIDEO_ROPE = "video_rope"
"""Ming's rotary embedding: positions in time, height and width; for text it is the ordinary one."""


@strict
class BailingMoeV2Config(PretrainedConfig):
    """Of the language model."""

    model_type = "bailing_moe_v2"
    keys_to_ignore_at_inference = ["past_key_values"]
    ignore_keys_at_rope_validation = {"mrope_section", "type"}
    attribute_map = {"num_local_experts": "num_experts", "n_shared_experts": "num_shared_experts"}

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    """Of the dense MLP in the first layers."""
    moe_intermediate_size: int = 512
    """Of one routed expert."""
    moe_shared_expert_intermediate_size: int | None = None
    """Of one shared expert; None: as a routed one."""
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int | None = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 32768
    use_qkv_bias: bool = False
    use_bias: bool = False
    """In the projection after attention."""
    use_qk_norm: bool = True
    attention_dropout: float | int = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 156892
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 156892

    rope_theta: float | int = 600000.0
    partial_rotary_factor: float | int | None = None
    """Share of a head that is rotated; None: of `rotary_dim`, or the whole."""
    rotary_dim: int | None = None
    """Dimensions of a head that are rotated; read where `partial_rotary_factor` is not given."""
    rope_parameters: Any = None
    """As transformers has them; made of `rope_theta`, `partial_rotary_factor` and the published ``rope_scaling``."""

    num_experts: int | None = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int | None = 1
    n_group: int = 8
    """Groups of experts; a token goes to experts of `topk_group` of them."""
    topk_group: int = 4
    routed_scaling_factor: float | int = 1.0
    norm_topk_prob: bool = True
    score_function: str = "sigmoid"
    moe_router_enable_expert_bias: bool = True
    first_k_dense_replace: int = 1
    router_type: str = "topN"
    """``topN``: one router; ``MultiRouter``: besides it one for tokens of images and one for those of audio."""
    num_nextn_predict_layers: int = 0
    """Layers after the last that predict further tokens (MTP); they are not built."""
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Fills what follows from other keys."""
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.partial_rotary_factor is None and self.rotary_dim is not None:
            self.partial_rotary_factor = self.rotary_dim / self.head_dim
        super().__post_init__(**kwargs)
        rope = self.rope_parameters
        if rope["rope_type"] == VIDEO_ROPE:  # the frequencies are the ordinary ones
            rope |= {"rope_type": "default", "type": VIDEO_ROPE}
            rope.setdefault("mrope_section", [8, 12, 12])

    def validate_architecture(self) -> None:
        """Refuses what no published model of the family has."""
        if self.score_function != "sigmoid":
            raise ValueError(f"score_function '{self.score_function}' is not covered, only 'sigmoid'")
        if self.router_type not in ("topN", "MultiRouter"):
            raise ValueError(f"router_type '{self.router_type}' is not covered, only 'topN' and 'MultiRouter'")
        rope_type = self.rope_parameters["rope_type"]
        if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
            raise ValueError(f"rope_scaling type '{rope_type}' is not covered")

    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it, and ``rope_scaling``, where other readers of these models look."""
        written: dict[str, Any] = super().to_dict()
        rope = dict(self.rope_parameters)
        kind = rope.pop("rope_type")
        scaling = {"type": kind} | {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        return written | {"rope_scaling": None if scaling == {"type": "default"} else scaling}


@strict
class BailingMoeConfig(BailingMoeV2Config):
    """The same under the model type of the published folders, so that an export keeps it."""

    model_type = SHARED_TYPE

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuses Ling 1, which has the same model type."""
        if self.architectures and ARCHITECTURE not in self.architectures:
            raise ValueError(f"{self.architectures[0]} is Ling 1, which is not covered; Ling 2.x is {ARCHITECTURE}")
        super().__post_init__(**kwargs)
