"""A layer and its adapter in one piece compute what peft computes layer by layer, and nothing that peft does not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import tiny_model
from train.ops.lora_linear import fuse_adapters
from train.ops.roomy import SLACK


def adapted(dtype=torch.float32, bias=False, **changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.SiLU(), nn.Linear(40, 16, bias=bias)).to(dtype)
    config = LoraConfig(target_modules=["0", "2"], **{"r": 4, "lora_alpha": 12} | changes)
    module = get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)  # peft begins with zeros, which hide half of the gradients
    return module


def results(module, x):
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (7, 24), (2, 5, 24)])
def test_values_and_gradients_are_those_of_peft(bias, shape):
    module = adapted(bias=bias)
    x = torch.randn(shape)
    expected = results(module, x)
    assert fuse_adapters(module) == 2
    found = results(module, x)
    assert found.keys() == expected.keys() and sum("lora" in key for key in found) == 4
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


def test_what_changes_afterwards_is_heard_and_outputs_may_be_written_into():
    module = adapted()
    assert fuse_adapters(module) == 2
    assert module(torch.randn(0, 24)).shape == (0, 16)
    module.base_model.model[0](torch.randn(3, 24)).mul_(2.0).sum().backward()
    module.add_adapter("other", LoraConfig(target_modules=["0", "2"], r=2, lora_dropout=0.5))
    module.set_adapter("other")
    layer, x = module.base_model.model[0], torch.randn(200, 24)
    nn.init.normal_(layer.lora_B["other"].weight)
    assert not torch.equal(layer(x), layer(x)), "an adapter with dropout"
    module.set_adapter("default")
    assert torch.equal(layer(x), layer(x))
    for parameter in module.parameters():
        parameter.requires_grad_()
    module.zero_grad()
    module(x).sum().backward()
    assert layer.base_layer.weight.grad is not None, "a base that learns after all"


def test_in_bf16_it_rounds_no_worse_than_peft_does():
    x = torch.randn(200, 24)
    exact = results(adapted(torch.float64), x.bfloat16().double())
    theirs = results(adapted(torch.bfloat16), x.bfloat16())
    module = adapted(torch.bfloat16)
    fuse_adapters(module)
    for key, mine in results(module, x.bfloat16()).items():
        off, off_theirs = ((v.double() - exact[key]).norm() / exact[key].norm() for v in (mine, theirs[key]))
        assert off < 1.2 * off_theirs + 1e-3, key


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=["dropout", "dora", "bias"]
)
def test_what_is_not_plain_stays_as_peft_has_it(changes):
    assert fuse_adapters(adapted(**changes)) == 0
    module = adapted()
    module.base_model.model[0].base_layer.weight.requires_grad_(True)
    assert fuse_adapters(module) == 1


def test_an_adapter_that_is_switched_off_or_merged_is_so():
    module, x = adapted(), torch.randn(3, 24)
    fuse_adapters(module)
    on = module(x)
    with module.disable_adapter():
        off = module(x)
    first, _, last = module.base_model.model
    assert torch.equal(off, last.base_layer(F.silu(first.base_layer(x)))) and not torch.allclose(on, off)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.merge_adapter()
    torch.testing.assert_close(module(x), on)


def test_a_copy_computes_with_its_own_weights_and_nothing_is_added_to_what_is_saved():
    module, x = adapted(), torch.randn(3, 24)
    names = set(module.state_dict())
    fuse_adapters(module)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert twin(x).any() and not module(x).any() and set(module.state_dict()) == names


class Calls(TorchDispatchMode):
    """Elements written by operators that do not multiply matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        others = ("mm", "view", "aten.t.", "detach", "alias", "new_empty", "resize_")
        if isinstance(out, torch.Tensor) and not any(word in str(func) for word in others):
            self.written += out.numel()
        return out


def test_activations_are_passed_over_less_often():
    x, written = torch.randn(512, 24), []
    for fused in (False, True):
        module = adapted()
        if fused:
            fuse_adapters(module)
        with Calls() as calls:
            results(module, x)
        written.append(calls.written)
    assert written[1] < 0.7 * written[0]


def test_below_the_lowest_adapter_there_is_no_backward_pass():
    model = tiny_model("llama").train()
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1])
    module = get_peft_model(model, config, autocast_adapter_dtype=False)
    fuse_adapters(module)
    gone_through = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_full_backward_hook(lambda *_, index=index: gone_through.append(index))
    module(input_ids=torch.arange(3, 12)[None]).logits.sum().backward()
    assert 1 in gone_through and 0 not in gone_through


def test_on_a_host_the_next_layers_tensors_fit_where_an_output_was():
    for on_host, slack in ((True, SLACK), (False, 0)):
        module = adapted()
        fuse_adapters(module, on_host=on_host)
        out = module(torch.randn(5, 24))
        assert out.untyped_storage().nbytes() == out.nbytes + slack
