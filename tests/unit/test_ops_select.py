"""Which version of an op runs, what is said about it, and that a layer with another formula is left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama import modeling_llama

from configs.errors import DeviceError, ErrorGroup
from tests.tiny import tiny_model
from tests.unit.ops_kit import NEEDS, compared_once, device_with, kernel, operators  # noqa: F401 - fixtures
from train.devices.ascend_kernels import KERNELS
from train.models.families import FAMILIES, Family
from train.ops.kernel import REFERENCES, Needs
from train.ops.rms_norm import rms_norm
from train.ops.select import KernelSelection

ALL = tuple(REFERENCES)
OWN = {op: kernel(version) for op, version in REFERENCES.items()}


def choose(model, kernels=OWN, *, family=FAMILIES["llama"], packed=True, **choices):
    """What runs by the device, and the line that says so."""
    lines = []
    selection = KernelSelection(device_with(kernels, **choices), family, next(model.parameters()).dtype, packed=packed)
    used = selection.use(model, lines.append)
    return used, " ".join(lines)


def test_all_that_agree_run_by_default_and_one_line_says_so():
    used, line = choose(tiny_model())
    assert used == ALL
    assert line == "kernels: attention, rms_norm, rotary, swiglu by ascend, compared with plain torch just now"


def test_a_device_without_kernels_is_silent_and_cannot_be_made_to():
    assert choose(tiny_model(), {}) == ((), "")
    with pytest.raises(DeviceError, match=r"device.swiglu_kernel: device, but .* no version of its own") as raised:
        choose(tiny_model(), {}, swiglu="device")
    assert raised.value.remedy == "device.swiglu_kernel=auto"


def test_a_version_that_disagrees_is_passed_over_by_auto_and_stops_device(caplog):
    wrong = OWN | {"rms_norm": kernel(lambda x, weight, epsilon: rms_norm(x, weight, 10 * epsilon))}
    used, line = choose(tiny_model(), wrong)
    assert used == ("attention", "rotary", "swiglu") and not line
    [record] = caplog.records  # a warning, on whichever rank
    assert record.levelname == "WARNING" and record.message.startswith("kernels: attention, rotary, swiglu by ascend")
    assert "rms_norm by plain torch: comparison in fp32: hidden states: values are off by" in record.message
    with pytest.raises(DeviceError, match=r"device.rms_norm_kernel.*values are off by \S+, allowed \S+") as raised:
        choose(tiny_model(), wrong, rms_norm="device")
    assert raised.value.remedy == "device.rms_norm_kernel=auto"


def test_full_memory_is_no_disagreement():
    def full(*args, **options):
        raise torch.OutOfMemoryError("NPU out of memory. Tried to allocate 2.00 MiB")

    with pytest.raises(torch.OutOfMemoryError):
        choose(tiny_model(), OWN | {"swiglu": kernel(full)})


def test_what_cannot_be_is_said_at_once_and_the_model_is_as_it_was():
    """Before there is a model; what shows only in the model, before anything in it is changed."""
    with pytest.raises(ErrorGroup) as raised:
        device = device_with({"attention": OWN["attention"]}, attention="device", swiglu="device")
        KernelSelection(device, FAMILIES["llama"], torch.float32, packed=False)
    assert [e.where for e in raised.value.errors] == ["device.attention_kernel", "device.swiglu_kernel"]
    model = tiny_model(hidden_act="gelu")
    with pytest.raises(DeviceError, match="LlamaMLP computes another formula"):
        choose(model, swiglu="device")
    assert all("forward" not in vars(module) for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_the_reference_when_it_is_asked_for():
    def never(*args, **options):
        raise AssertionError("not even for a comparison")

    model = tiny_model()
    used, line = choose(model, OWN | {"attention": kernel(never)}, attention="reference", packed=True)
    assert used == ("rms_norm", "rotary", "swiglu") and "attention by plain torch: as configured" in line
    assert model.config._attn_implementation == "sdpa"


def test_rows_of_one_sample_keep_their_attention():
    model = tiny_model()
    used, line = choose(model, packed=False)
    assert "attention" not in used and "attention by plain torch: no row holds several samples" in line
    assert model.config._attn_implementation == "sdpa"


def test_a_family_whose_layers_are_not_known_is_left_alone():
    """Such as every model that brings its own code."""
    used, line = choose(tiny_model(), family=Family.unlisted("strange"), packed=False)
    assert used == () and line.count("the layers of family 'strange' are not known") == 1


class Scaled(modeling_llama.LlamaRMSNorm):
    """Gemma's formula in a subclass."""

    def forward(self, hidden_states):
        return rms_norm(hidden_states, 1 + self.weight, self.variance_epsilon)


def subclassed(model, monkeypatch):
    for layer in model.model.layers:
        layer.input_layernorm.__class__ = layer.post_attention_layernorm.__class__ = Scaled
    model.model.norm.__class__ = Scaled


def changed_class(model, monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", Scaled.forward)


def other_rounding(model, monkeypatch):
    def forward(self, x):
        return (self.weight.float() * rms_norm(x.float(), torch.ones(()), self.variance_epsilon)).to(x.dtype)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)


def own_forward(model, monkeypatch):
    model.model.norm.forward = lambda x: x


def another_activation(model, monkeypatch):
    for layer in model.model.layers[1:]:
        layer.mlp.act_fn = nn.GELU()


def another_rotation(model, monkeypatch):
    monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: -F.pad(x, (0, 0)).flip(-1))


def no_rotation(model, monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", lambda self, **kwargs: None)


CHANGES = {
    subclassed: ("rms_norm", "no LlamaRMSNorm"),
    changed_class: ("rms_norm", "LlamaRMSNorm computes another formula here"),
    own_forward: ("rms_norm", "something else has replaced the forward pass of a LlamaRMSNorm"),
    other_rounding: ("rms_norm", "LlamaRMSNorm computes another formula here"),
    another_activation: ("swiglu", "LlamaMLP computes another formula here"),
    another_rotation: ("rotary", "LlamaAttention computes another formula here"),
    no_rotation: ("rotary", "LlamaAttention computes another formula here"),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_layer_with_another_formula_is_never_replaced(change, monkeypatch):
    op, reason = CHANGES[change]
    dtype = torch.bfloat16 if change is other_rounding else torch.float32
    model = tiny_model().to(dtype)
    change(model, monkeypatch)
    used, line = choose(model)
    assert op not in used and len(used) == len(ALL) - 1
    assert f"{op} by plain torch: " in line and reason in line


def test_limits_of_the_documents_are_met_or_named(operators):  # noqa: F811
    unmet = {op: version.unmet for op, version in KERNELS.items()}
    assert all(limit(NEEDS) is None for limit in unmet.values())
    for op, needs, words in (
        ("attention", replace(NEEDS, head_dim=1024), "heads of 1024"),
        ("attention", replace(NEEDS, heads=512), "512 heads"),
        ("attention", replace(NEEDS, dropout=1.0), "dropout 1"),
        ("rotary", replace(NEEDS, head_dim=896), "heads of 896"),
        ("rotary", replace(NEEDS, rotary_factor=1.2), "up to 1.2"),
    ):
        assert words in unmet[op](needs)
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    used, line = choose(tiny_model(rope_parameters=yarn), KERNELS)
    assert "rotary" not in used and "cosine and sine up to 1.13863 (context extension)" in line
    assert operators["rotary"] == 0


def test_needs_are_those_of_the_model():
    model = tiny_model("mistral", attention_dropout=0.1, rms_norm_eps=1e-3)
    assert Needs.of(model) == Needs(4, 2, 8, 32, 48, 1e-3, 16, 0.1, 1.0)
