"""What the fork server imports once, so that each rank starts with it: see `tests/distributed/forks.py`."""

from __future__ import annotations

import gc

import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401  # what `deepspeed.initialize` imports late
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import peft  # noqa: F401
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

import train.run  # noqa: F401
from tests.distributed import layouts  # noqa: F401

gc.collect()
gc.freeze()  # DeepSpeed collects often; without it each collection of each rank walks through all of torch's modules
