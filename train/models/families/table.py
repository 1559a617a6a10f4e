"""The families that crosstune knows, by measurement on the pinned transformers; `docs/families.md` has the proofs."""

from __future__ import annotations

from train.models.families.facts import Family, Layers

_SOFTMAX = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLA = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
"""Multi-head latent attention (arXiv:2405.04434); `q_proj` where the query has no low rank."""
_GATED_DELTA = (*_SOFTMAX, "in_proj_qkv", "in_proj_qkvz", "in_proj_z", "out_proj")
_KIMI_DELTA = tuple(dict.fromkeys((*_SOFTMAX, "g_proj", "g_a_proj", "g_b_proj", *_MLA)))
"""Kimi delta attention (arXiv:2510.26692) in some layers, latent attention in the others."""

_LING2 = ("query_key_value", "dense")
_INDEXER = r"\.indexer\."
_CHOICE_REASON = "the indexer only chooses what attention looks at, so the language-model loss gives it no gradient"
_INDEXER_REASON = f"{_CHOICE_REASON}; objective.indexer_kl trains it"


def _dense(name: str, prefix: str, title: str) -> Family:
    """Softmax attention and a gated MLP, in layers of which devices may have faster versions."""
    layers = Layers(
        module=f"transformers.models.{name}.modeling_{name}",
        rms_norm=f"{prefix}RMSNorm",
        rotary=f"{prefix}Attention",
        swiglu=f"{prefix}MLP",
    )
    return Family(name, title, _SOFTMAX, layers=layers)


def _qwen35(model_type: str, title: str, mixer: str) -> Family:
    return Family(model_type, title, _GATED_DELTA, packed_mixers=(mixer,))


_FAMILIES = (
    _dense("llama", "Llama", "Llama 3, R1 distills of it"),
    _dense("mistral", "Mistral", "Mistral"),
    _dense("qwen2", "Qwen2", "Qwen2.5, R1 distills of it"),
    _dense("qwen3", "Qwen3", "Qwen3"),
    _qwen35("qwen3_5", "Qwen3.5", "Qwen3_5GatedDeltaNet"),
    _qwen35("qwen3_5_text", "Qwen3.5, text only", "Qwen3_5GatedDeltaNet"),
    _qwen35("qwen3_5_moe", "Qwen3.5 MoE", "Qwen3_5MoeGatedDeltaNet"),
    _qwen35("qwen3_5_moe_text", "Qwen3.5 MoE, text only", "Qwen3_5MoeGatedDeltaNet"),
    _qwen35("qwen3_next", "Qwen3-Next", "Qwen3NextGatedDeltaNet"),
    Family("glm4_moe", "GLM-4.5, 4.6, 4.7", _SOFTMAX),
    Family(
        "glm_moe_dsa",
        "GLM-5",
        _MLA,
        packed_mixers=("GlmMoeDsaAttention",),
        untrained=_INDEXER,
        untrained_reason=_INDEXER_REASON,
    ),
    Family(
        "glm5_next",
        "GLM-5.3-Flash",
        _KIMI_DELTA,
        packed_mixers=("Glm5NextTextLinearAttention", "Glm5NextTextAttention"),
        untrained=_INDEXER,
        untrained_reason=_INDEXER_REASON,
    ),
    Family("deepseek_v2", "DeepSeek V2", _MLA),
    Family("deepseek_v3", "DeepSeek V3, R1, Kimi K2", _MLA),
    Family(
        "deepseek_v32",
        "DeepSeek V3.2",
        _MLA,
        packed_mixers=("DeepseekV32Attention",),
        untrained=_INDEXER,
        untrained_reason=_INDEXER_REASON,
    ),
    Family(
        "deepseek_v4",
        "DeepSeek V4",
        ("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj"),
        attention_parameters=("o_a_proj.weight",),
        packed_mixers=("DeepseekV4Attention",),
        untrained=_INDEXER,
        untrained_reason=_CHOICE_REASON,
    ),
    Family("kimi_k25", "Kimi K2.5", _MLA),
    Family(
        "kimi_linear",
        "Kimi Linear",
        _KIMI_DELTA,
        packed_mixers=("KimiLinearDeltaAttention",),
    ),
    Family(
        "bailing_hybrid",
        "Ling-3",
        _KIMI_DELTA,
        packed_mixers=("BailingHybridDeltaAttention",),
    ),
    Family("bailing_moe_v2", "Ling 2, Ring 2", _LING2),
    Family("bailing_moe", "Ling 2, Ring 2 under the name of Ling 1", _LING2),
    Family(
        "bailingmm_moe_v2_lite",
        "Ming-Flash-Omni 2.0, the thinker",
        _LING2,
        untrained=r"\.(image_gate|audio_gate)\.",
        untrained_reason="text goes through the text router only, so the routers of images and audio get no gradient",
    ),
    Family(
        "minimax",
        "MiniMax-Text-01, M1",
        (*_SOFTMAX, "qkv_proj", "out_proj", "output_gate"),
        packed_mixers=("MiniMaxLightningAttention",),
    ),
    Family("minimax_m2", "MiniMax M2, M2.5", _SOFTMAX),
    Family(
        "minimax_m3_vl",
        "MiniMax M3",
        _SOFTMAX,
        packed_mixers=("MiniMaxM3VLAttention",),
        untrained=_INDEXER,
        untrained_reason=_CHOICE_REASON,
    ),
    Family("step3p7", "Step-3.7", _SOFTMAX),
)

FAMILIES = {family.model_type: family for family in _FAMILIES}
