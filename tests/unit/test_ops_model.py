"""Whole models with all of a device's kernels on packed rows: losses and gradients are those without.

tests/contracts/test_ops.py runs this file once more where the operators are behind the real torch_npu.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from configs.schema.objective import CausalLMConfig
from tests.tiny import TINY_CONFIGS, samples_of, tiny_model
from tests.unit.ops_kit import compared_once, device_with, operators  # noqa: F401 - fixtures
from train.data.collate import collate
from train.data.plan import RowKind
from train.models.families import FAMILIES
from train.objectives.causal_lm import CausalLM
from train.ops.kernel import REFERENCES
from train.ops.packed_attention import register
from train.ops.select import KernelSelection

LENGTHS = (37, 1, 75, 20)
DEVICE = device_with()


def made(family="llama", *, kernels, lora=False, checkpointing=False, packed=True, **changes):
    """A model in training mode on the device, with or without its kernels."""
    model = tiny_model(family, **changes).train()
    model.set_attn_implementation(register() if packed else "sdpa")
    module = model
    if lora:
        torch.manual_seed(1)
        module = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    module.to(DEVICE.torch_device)
    if kernels:
        used = KernelSelection(DEVICE, FAMILIES[family], torch.float32, packed=packed).use(model)
        assert used == tuple(op for op in REFERENCES if packed or op != "attention")
    return module


def step(module, kind=RowKind.packed):
    """Loss and gradients of one micro-batch."""
    samples = samples_of(LENGTHS, vocab_size=97)
    rows = {RowKind.packed: ((0, 1, 2, 3),), RowKind.padded: ((0,), (1,), (2,), (3,))}[kind]
    batch = collate(rows, samples.__getitem__, kind=kind, device=DEVICE.torch_device)
    module.zero_grad(set_to_none=True)
    loss = CausalLM(CausalLMConfig()).loss_sum(module, batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def must_be_equal(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        error = (gradient - theirs[1][name]).norm() / theirs[1][name].norm()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_loss_and_every_gradient_are_those_of_plain_torch(family, operators):  # noqa: F811
    plain = made(family, kernels=False)
    theirs = step(plain)
    assert not operators
    module = made(family, kernels=True)
    assert module.state_dict().keys() == plain.state_dict().keys()
    operators.clear()  # what the comparison called
    must_be_equal(step(module), theirs)
    layers, norms = 3, 13 if family == "qwen3" else 7
    assert operators == {"attention": layers, "rms_norm": norms, "rotary": 2 * layers, "swiglu": layers}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_adapters_and_with_layers_computed_again(checkpointing, operators):  # noqa: F811
    options = {"lora": True, "checkpointing": checkpointing}
    theirs = step(made(kernels=False, **options))
    module = made(kernels=True, **options)
    operators.clear()
    ours = step(module)
    must_be_equal(ours, theirs)
    assert ours[1] and all("lora_" in name for name in ours[1])
    assert operators["attention"] == (6 if checkpointing else 3)


def test_padded_rows_with_their_mask(operators):  # noqa: F811
    theirs = step(made(kernels=False, packed=False), RowKind.padded)
    module = made(kernels=True, packed=False)
    operators.clear()
    must_be_equal(step(module, RowKind.padded), theirs)
    assert set(operators) == {"rms_norm", "rotary", "swiglu"}


def test_a_model_beside_one_with_kernels_has_none_and_a_copy_has_its_own(operators, tmp_path):  # noqa: F811
    module, beside = made(kernels=True), made(kernels=False, seed=5)
    alone = step(made(kernels=False, seed=5))
    operators.clear()
    must_be_equal(step(beside), alone)
    assert not operators
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    must_be_equal(step(copied), step(made(kernels=False)))
    assert operators["rms_norm"] == 7
    copied.save_pretrained(tmp_path)
    operators.clear()
    opened = type(copied).from_pretrained(tmp_path, attn_implementation=register()).to(DEVICE.torch_device)
    must_be_equal(step(opened.train()), step(made(kernels=False)))
    assert not operators and "ascend" not in (tmp_path / "config.json").read_text()
