"""Which class of transformers a model folder is opened with."""

from __future__ import annotations

from typing import Any

import torch

from train.models.families import brings_code

ROUTER_AND_MIXING = ("e_score_correction_bias", "attn_hc", "ffn_hc", "hc_head")
"""Small tensors that decide where tokens go (router corrections, hyper-connections) stay in fp32, on the families too
whose classes forget to say so."""


def model_class(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The class whose `from_pretrained` builds the whole model.

    ``AutoModelForCausalLM`` alone would drop the vision tower of some families and not know others, so the class that
    the folder names comes first; then what transformers opens an image-and-text config with; then a causal model.

    Args:
        config: of transformers; its ``architectures`` name a class, in folders of the hub maybe one that only remote
            code has.
        trust_remote_code: a folder that brings its own code is opened by it, through the auto class.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    causal = transformers.AutoModelForCausalLM
    if trust_remote_code and brings_code(config):
        return causal
    known = (
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
    )
    for name in getattr(config, "architectures", None) or []:
        if name in known:
            return getattr(transformers, name)
    for mapping in (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, auto.MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    return causal  # its error names what transformers knows


def attention_for(chosen: Any, wanted: str) -> str:
    """`wanted`, or ``eager`` for a class that knows no SDPA (DeepSeek V4 has sinks and compressed keys)."""
    return "eager" if wanted == "sdpa" and not getattr(chosen, "_supports_sdpa", True) else wanted


def keeping_small_parts_in_fp32(chosen: Any) -> Any:
    """The class, asked to load `ROUTER_AND_MIXING` in fp32 whatever the working dtype."""
    if not hasattr(chosen, "_keep_in_fp32_modules_strict"):  # an auto class
        return chosen
    kept = {*(chosen._keep_in_fp32_modules_strict or ()), *ROUTER_AND_MIXING}
    # Of the same name, by which transformers finds the family's table of weight conversions.
    return type(chosen.__name__, (chosen,), {"_keep_in_fp32_modules_strict": kept, "__module__": chosen.__module__})


def from_config(config: Any, *, dtype: torch.dtype, attention: str = "sdpa", trust_remote_code: bool = False) -> Any:
    """A model of random weights, or without any on the meta device.

    Raises:
        ValueError: or another error of transformers'; it knows no such model.
    """
    chosen = model_class(config, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention_for(chosen, attention)}
    if not hasattr(chosen, "from_config"):
        return chosen._from_config(config, **options)
    try:
        return chosen.from_config(config, trust_remote_code=trust_remote_code, **options)
    except ValueError as error:
        if attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise
        options["attn_implementation"] = "eager"  # all that a class of the folder's own code knows
        return chosen.from_config(config, trust_remote_code=trust_remote_code, **options)
