"""A tiny random model of every family that crosstune knows, and the folders that users have of them.

Sizes are small, but every kind of layer of the family is there: dense and routed, sliding and full, linear and
compressed attention.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny import save_tiny_tokenizer

VOCABULARY = 320
"""Above what the tokenizer of `save` knows; the ids from 310 on mark images and the like."""
IMAGE, VIDEO = 310, 311
_VISION_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 312,
    "vision_end_token_id": 313,
}

_IDS = {
    "initializer_range": 0.08,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
_GQA = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_DENSE = _IDS | _GQA | {"num_hidden_layers": 3, "intermediate_size": 128}
_MLA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
_DEEPSEEK = _IDS | _MLA | {"num_hidden_layers": 3, "first_k_dense_replace": 1}
_GROUPED = {"n_group": 2, "topk_group": 1}
_INDEXER = {"index_topk": 8, "index_head_dim": 32, "index_n_heads": 4}
_ROTARY_PARTLY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_QWEN35 = (
    _IDS
    | _GQA
    | {
        "num_hidden_layers": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_conv_kernel_dim": 4,
        "rope_parameters": _ROTARY_PARTLY | {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    }
)
_QWEN35_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
}
_QWEN_EXPERTS = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "num_experts": 8,
}
_LOCAL_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
_MLA_LOCAL = {key: value for key, value in _MLA.items() if key != "n_routed_experts"} | _LOCAL_EXPERTS


_LING: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VIDEO_ROPE = {"type": "video_rope", "mrope_section": [1, 2, 1]}


def _without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _DENSE),
    "mistral": ("MistralForCausalLM", _DENSE | {"sliding_window": 16}),
    "qwen2": ("Qwen2ForCausalLM", _without(_DENSE, "head_dim")),
    "qwen3": ("Qwen3ForCausalLM", _DENSE),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", _QWEN35 | {"intermediate_size": 128}),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {"text_config": _QWEN35 | {"intermediate_size": 128}, "vision_config": _QWEN35_VISION, **_VISION_TOKENS},
    ),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", _QWEN35 | _QWEN_EXPERTS),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {"text_config": _QWEN35 | _QWEN_EXPERTS, "vision_config": _QWEN35_VISION, **_VISION_TOKENS},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        _QWEN35 | _QWEN_EXPERTS | {"rope_parameters": _ROTARY_PARTLY, "intermediate_size": 128},
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        _IDS
        | _GQA
        | {
            "num_hidden_layers": 3,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
        },
    ),
    "glm_moe_dsa": (
        "GlmMoeDsaForCausalLM",
        _DEEPSEEK | _INDEXER | {"num_hidden_layers": 4, "index_topk_freq": 2},
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", _DEEPSEEK),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _DEEPSEEK | _GROUPED),
    "deepseek_v32": ("DeepseekV32ForCausalLM", _DEEPSEEK | _GROUPED | _INDEXER),
    "deepseek_v4": (
        "DeepseekV4ForCausalLM",
        _IDS
        | {
            "hidden_size": 64,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "q_lora_rank": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "layer_types": [
                "sliding_attention",
                "heavily_compressed_attention",
                "compressed_sparse_attention",
                "compressed_sparse_attention",
            ],
            "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            "sliding_window": 8,
            "o_groups": 2,
            "o_lora_rank": 16,
            "index_n_heads": 4,
            "index_head_dim": 32,
            "index_topk": 4,
            "qk_rope_head_dim": 16,
            "hc_mult": 4,
        },
    ),
    "kimi_k25": (
        "Kimi_K25ForConditionalGeneration",
        {
            "text_config": _DEEPSEEK | {"model_type": "deepseek_v3", "n_group": 1, "topk_group": 1},
            "vision_config": {
                "patch_size": 4,
                "pos_emb_height": 8,
                "pos_emb_width": 8,
                "pos_emb_time": 4,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
            },
            "projection_hidden_size": 32,
            "tie_word_embeddings": False,
            **_VISION_TOKENS,
        },
    ),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        _IDS
        | _MLA_LOCAL
        | {
            "q_lora_rank": None,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        },
    ),
    "bailing_hybrid": (
        "BailingHybridForCausalLM",
        _IDS
        | _without(_MLA_LOCAL, "q_lora_rank")
        | _GROUPED
        | {"num_hidden_layers": 4, "layer_group_size": 4, "head_dim": 16, "first_k_dense_replace": 1},
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        _IDS | _GQA | _LOCAL_EXPERTS | {"num_hidden_layers": 4, "intermediate_size": 64, "block_size": 16},
    ),
    "minimax_m2": (
        "MiniMaxM2ForCausalLM",
        _IDS | _GQA | _LOCAL_EXPERTS | {"num_hidden_layers": 3, "intermediate_size": 32, "rotary_dim": 8},
    ),
    "minimax_m3_vl": (
        "MiniMaxM3SparseForConditionalGeneration",
        {
            "text_config": _IDS
            | _GQA
            | _LOCAL_EXPERTS
            | {
                "num_hidden_layers": 3,
                "intermediate_size": 32,
                "dense_intermediate_size": 128,
                "shared_intermediate_size": 32,
                "rotary_dim": 8,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
                "index_n_heads": 2,
                "index_head_dim": 16,
                "index_block_size": 4,
                "index_topk_blocks": 2,
                "index_local_blocks": 1,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 4,
            },
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "projector_hidden_size": 64,
        },
    ),
    "step3p7": (
        "Step3p7ForConditionalGeneration",
        {
            "text_config": _IDS
            | _GQA
            | _LOCAL_EXPERTS
            | {
                "num_hidden_layers": 4,
                "intermediate_size": 128,
                "moe_intermediate_size": 32,
                "share_expert_dim": 32,
                "n_routed_experts": 8,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
                "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                "sliding_window": 8,
                "moe_router_scaling_factor": 1.0,
            },
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "mlp_ratio": 2.0,
                "max_position_embeddings": 16,
            },
            "image_token_id": IMAGE,
        },
    ),
    "glm5_next": (
        "Glm5NextForConditionalGeneration",
        {
            "text_config": _IDS
            | _MLA
            | _INDEXER
            | {
                "qk_rope_head_dim": 0,
                "num_hidden_layers": 4,
                "linear_head_dim": 16,
                "linear_num_heads": 4,
                "index_kpool": 4,
                "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "num_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "out_hidden_size": 64,
                "intermediate_size": 64,
                "projection_intermediate_size": 64,
            },
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_start_token_id": 312,
            "image_end_token_id": 313,
            "video_start_token_id": 314,
            "video_end_token_id": 315,
        },
    ),
    "bailing_moe_v2": ("BailingMoeV2ForCausalLM", _LING),
    "bailingmm_moe_v2_lite": (
        "BailingMM2NativeForConditionalGeneration",
        {"llm_config": _LING | {"router_type": "MultiRouter", "rope_scaling": _VIDEO_ROPE}, "mlp_depth": 2},
    ),
}
FAMILIES = tuple(CONFIGS)


def build(
    name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, attention: str | None = None, **changes: Any
) -> Any:
    """A random model in eval mode.

    Args:
        name: one of `FAMILIES`.
        dtype: of the weights; what the class keeps in fp32 is not spared.
        seed: of the weights.
        attention: implementation; None: transformers' choice.
        changes: to the config, of the language model where there are several.
    """
    class_name, values = CONFIGS[name]
    model_class = class_of(class_name)
    values = copy.deepcopy(values)  # transformers may write into what it is given
    inner = next((key for key in ("text_config", "llm_config") if key in values), None)
    (values[inner] if inner else values).update(changes)
    config = model_class.config_class(**values)
    config.architectures = [class_name]
    if attention:
        config._attn_implementation = attention
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        # What starts at zero or at one shows no fault.
        for part, tensor in [*model.named_parameters(), *model.named_buffers()]:
            last = part.rpartition(".")[2]
            if last == "tid2eid":
                experts = model.config.get_text_config().n_routed_experts
                tensor.copy_(torch.stack([torch.randperm(experts)[: tensor.shape[1]] for _ in tensor]))
            elif last in ("e_score_correction_bias", "sinks", "position_bias"):
                tensor.normal_(std=0.1)
    model.config.use_cache = False
    return model.to(dtype).eval()


def class_of(class_name: str) -> Any:
    """A class of transformers, or of ours where it has none."""
    if hasattr(transformers, class_name):
        return getattr(transformers, class_name)
    from train.models import bailing_moe_v2
    from train.models.bailing_moe_v2 import ming, modeling

    bailing_moe_v2.register()
    return getattr(modeling, class_name, None) or getattr(ming, class_name)


def save(name: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A folder as a user has it: config, safetensors in the hub's layout, tokenizer with a ChatML template."""
    build(name, dtype=dtype, seed=seed, **changes).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder
