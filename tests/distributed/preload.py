"""What the fork server imports once, so that each rank starts with it: see `tests/distributed/forks.py`."""

from __future__ import annotations

import deepspeed  # noqa: F401  # the server's environment says DS_ACCELERATOR=cpu
import peft  # noqa: F401
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

import tests.distributed.layouts
import train.run  # noqa: F401
