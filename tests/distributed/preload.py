"""What the fork server imports once, so that each rank starts with it: see `tests/distributed/forks.py`."""

from __future__ import annotations

import gc

import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401  # what `deepspeed.initialize` imports late
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import pandas  # noqa: F401  # pyarrow imports it late
import peft  # noqa: F401
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3MoeForCausalLM  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from tests.distributed import layouts, tiny_training  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # builds the table of all models, once

gc.collect()
gc.freeze()  # DeepSpeed collects often; without it each collection of each rank walks through all of torch's modules
