"""FLOPs of the model, against a count by hand and against torch's own counter."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import tiny_model
from train.observe.flops import flops_per_token, mean_length, model_flops_utilisation

# tests/tiny.py: 3 layers, hidden 32, feed-forward 48, 4 heads and 2 key-value heads of 8, vocabulary 97.
ATTENTION = 32 * 32 + 32 * 16 + 32 * 16 + 32 * 32
MLP = 3 * 32 * 48
HEAD = 97 * 32
LENGTH = 24


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))


def test_full_tuning_by_hand():
    expected = 6 * (3 * (ATTENTION + MLP) + HEAD) + 12 * 3 * 32 * LENGTH
    assert flops_per_token(tiny_model(tie_word_embeddings=True), length=LENGTH) == expected
    assert flops_per_token(tiny_model(tie_word_embeddings=False), length=LENGTH) == expected, "a lookup costs nothing"


def test_lora_by_hand():
    adapters = 3 * (2 * 32 + 2 * 32 + 2 * 48 + 2 * 32)
    expected = 4 * (3 * (ATTENTION + MLP) + HEAD / 4) + 6 * adapters + 12 * 3 * 32 * LENGTH
    assert flops_per_token(adapted(tiny_model()), length=LENGTH, supervised_share=0.25) == expected


def test_attention_of_layers_with_heads_of_their_own():
    """Gemma 4's last layer has wider ones; its config refuses to name one width."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8, "global_head_dim": 16}
    words = {"vocab_size": 97, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "pad_token_id": 2}
    config = AutoConfig.for_model(
        "gemma4_text", num_key_value_heads=2, num_kv_shared_layers=0, **sizes, **kinds, **words
    )
    model = AutoModelForCausalLM.from_config(config)
    per_position = flops_per_token(model, length=101) - flops_per_token(model, length=100)
    assert per_position == 12 * (4 * 8 + 4 * 16)


def test_torch_counts_the_same():
    """Its counter sees every matrix product that is really made; eager attention is made of them, forward and back."""
    model = tiny_model().train()
    model.set_attn_implementation("eager")
    ids = torch.arange(LENGTH)[None] + 3
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert counter.get_total_flops() == flops_per_token(model, length=LENGTH) * LENGTH


def test_what_is_not_covered_is_not_guessed():
    model = tiny_model()
    model.experts = torch.nn.Parameter(torch.zeros(4, 2, 2))
    assert flops_per_token(model, length=1) is None
    assert model_flops_utilisation(1e3, None, 1e12, 1) is None
    assert model_flops_utilisation(1e3, 1e9, None, 1) is None


def test_utilisation_is_of_all_devices():
    assert model_flops_utilisation(2e3, 1e9, 4e12, 2) == 0.25
    assert mean_length([10, 30]) == 25
