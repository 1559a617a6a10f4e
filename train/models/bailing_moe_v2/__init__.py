"""Ling and Ring 2.x (`bailing_moe_v2`) and the thinker of Ming-Flash-Omni 2.0, which transformers does not know.

Written from the published configs, key names and papers (arXiv:2507.17702, arXiv:2506.09344); no code of a model folder
is run. `register_for` makes them known to transformers' auto classes, so that all else treats them as any family.

Not covered: Ming's vision and audio towers, talker and image generator (`ming.CARRIED_OVER`), prediction of several
tokens (MTP), training in FP8, Ling 1.
"""

from __future__ import annotations

import json
from pathlib import Path

ARCHITECTURE = "BailingMoeV2ForCausalLM"
MODEL_TYPES = ("bailing_moe_v2", "bailingmm_moe_v2_lite")
SHARED_TYPE = "bailing_moe"
"""What the published folders of Ling 2.x call their model type; those of Ling 1, another model, call it the same."""


def register_for(model_dir: Path) -> None:
    """Makes the models known to transformers if the folder is one of them.

    A folder of Ling 1 is left alone: it runs by its own code, where the user trusts it.
    """
    try:
        written = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        model_type, architectures = written["model_type"], written.get("architectures") or []
    except (OSError, ValueError, KeyError, TypeError):
        return  # what is wrong with the file is told by who opens it
    if model_type in MODEL_TYPES or model_type == SHARED_TYPE and ARCHITECTURE in architectures:
        register()


def register() -> None:
    """Makes the models known to transformers' auto classes; may be called again."""
    from transformers import AutoConfig
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    from train.models.bailing_moe_v2 import conversion
    from train.models.bailing_moe_v2.configuration import BailingMoeConfig, BailingMoeV2Config
    from train.models.bailing_moe_v2.configuration_ming import BailingMM2Config
    from train.models.bailing_moe_v2.ming import BailingMM2NativeForConditionalGeneration as Ming
    from train.models.bailing_moe_v2.modeling import BailingMoeV2ForCausalLM, BailingMoeV2Model

    for config, base, causal, weights in (
        (BailingMoeV2Config, BailingMoeV2Model, BailingMoeV2ForCausalLM, conversion.ling()),
        (BailingMoeConfig, BailingMoeV2Model, BailingMoeV2ForCausalLM, conversion.ling()),
        (BailingMM2Config, Ming, Ming, conversion.ming()),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        MODEL_MAPPING.register(config, base, exist_ok=True)
        MODEL_FOR_CAUSAL_LM_MAPPING.register(config, causal, exist_ok=True)
        register_checkpoint_conversion_mapping(config.model_type, weights, overwrite=True)
