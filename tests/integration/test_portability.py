"""`crosstune doctor portability` on a clean model, on one with every fault planted, and on models too large to hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.errors import ConfigError, DeviceError, ModelError
from configs.schema.device import AscendConfig, DeviceConfig
from configs.schema.doctor import PortabilityConfig
from configs.schema.model import ModelConfig
from launchers.doctor.portability import portability
from launchers.doctor.portability.shrink import Size, check_memory, shrink
from tests.command import crosstune
from tests.tiny import save_tiny_model

PLANTED = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class PlantedConfig(PretrainedConfig):
    model_type = "planted"

    def __init__(self, vocab_size=64, hidden_size=16, num_hidden_layers=2, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**kwargs)


class Mixer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.project = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        x = self.project(x)
        mixed = torch.fft.rfft(x.float(), dim=1)  # planted: fft
        x = x + torch.fft.irfft(mixed, n=x.shape[1], dim=1).to(x.dtype)
        weights = torch.softmax(x.double(), dim=-1)  # planted: narrowed
        weights = weights * torch.ones(1, dtype=torch.float64, device=x.device)  # planted: float64
        place = torch.arange(x.shape[1])
        torch.cdist(x.detach().half(), x.detach().half())  # planted: no CPU kernel
        x = x * (weights + 1).to(x.dtype) + torch.ones(1, x.shape[1], 1) / (x[..., :1] + 9)  # planted: mixing
        return (x + place.to(x.device)[None, :, None] * 0).bfloat16()


class PlantedForCausalLM(PreTrainedModel):
    config_class = PlantedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Mixer(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids.cuda())  # planted: .cuda()
        with torch.autocast("cuda", enabled=False):  # planted: autocast
            for layer in self.layers:
                x = layer(x)
        torch.cuda.synchronize()  # planted: synchronize
        torch.cuda.empty_cache()  # planted: empty_cache
        return CausalLMOutput(logits=self.head(x.to(0)))
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    (folder / "modeling_planted.py").write_text(PLANTED)
    content = {
        "model_type": "planted",
        "architectures": ["PlantedForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_planted.PlantedConfig",
            "AutoModelForCausalLM": "modeling_planted.PlantedForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def words(standin, model: Path, *more: str) -> list[str]:
    at = ["device=ascend", f"standin={standin.built.folder.parent}"]
    return ["doctor", "portability", f"model.path={model}", *at, *more]


def test_a_clean_model(standin, tmp_path):
    """Its own weights, all layers, every operator listed with its place."""
    model = save_tiny_model(tmp_path / "model")
    shown = crosstune(*words(standin, model, "tokens=16", f"out={tmp_path / 'report.json'}"))
    assert "nothing found that stops this model" in shown and "all layers, own weights" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["stages"] == ["opening", "moving to the device", "forward", "backward", "generate"]
    assert {finding["verdict"] for finding in report["findings"]} <= {"asked by libraries"}
    attention = report["operators"]["aten::_log_softmax"]
    assert attention["kernel"] and attention["dtypes"] == ["float32"]
    projected = report["operators"]["aten::mm"]["place"] | {"file": ""}
    assert projected["module"] == "model.layers.0.self_attn.q_proj", projected


def test_every_planted_fault_is_found_in_one_go_at_its_line(standin, planted, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    given = ["layers=1", "tokens=16", "model.trust_remote_code=true", f"out={tmp_path / 'report.json'}"]
    shown = crosstune(*words(standin, planted, *given), code=2)
    report = json.loads((tmp_path / "report.json").read_text())
    lines = {
        line.partition("# planted: ")[2]: n for n, line in enumerate(PLANTED.splitlines(), 1) if "# planted: " in line
    }
    file = str(planted / "modeling_planted.py")
    got = {(f["verdict"], f["kind"], f["what"], f["line"]) for f in report["findings"] if f["file"] == file}
    expected = {
        ("stops", "cuda", ".cuda()", lines[".cuda()"]),
        ("stops", "cuda", "torch.cuda.synchronize()", lines["synchronize"]),
        ("silent", "cuda", "torch.cuda.empty_cache()", lines["empty_cache"]),
        ("silent", "cuda", 'autocast: device "cuda"', lines["autocast"]),
        ("silent", "dtype", "float64 was asked for, float32 was given", lines["narrowed"]),
        ("unknown", "operator", "aten::_cdist_forward of float16", lines["no CPU kernel"]),
        ("stops", "device mixing", "aten::div.Tensor on tensors of the NPU and the CPU", lines["mixing"]),
    }
    assert expected <= got, (got, shown)
    fft = [f for f in report["findings"] if "_fft_r2c" in f["what"] and f["line"] == lines["fft"]]
    assert fft and fft[0]["module"] == "layers.0", report["findings"]
    (double,) = (f for f in report["findings"] if f["kind"] == "dtype" and f["what"].startswith("float64 in"))
    assert (double["file"], double["line"]) == (file, lines["float64"]) and "mul.Tensor" in double["what"]
    assert all(Path(f["file"]).name != "watch.py" for f in report["findings"])
    assert "forward" in report["stages"], report["findings"]
    assert "layers 0 of 2" in shown and "things stop this model" in shown


def test_what_is_refused_before_anything_starts(planted):
    model = ModelConfig(path=str(planted))
    with pytest.raises(ModelError, match=r"modeling_planted\.py") as caught:
        portability(PortabilityConfig(model=model, device=AscendConfig(), layers=1))
    assert caught.value.where == "model.trust_remote_code"
    with pytest.raises(ConfigError, match="only Ascend has a stand-in"):
        portability(PortabilityConfig(model=model, device=DeviceConfig()))


@pytest.mark.slow
def test_a_model_that_no_machine_holds_is_refused_by_its_size(standin, tmp_path):
    big = {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "intermediate_size": 53248}
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256} | big
    (tmp_path / "config.json").write_text(json.dumps(content))
    shown = crosstune(*words(standin, tmp_path, "layers=126"), code=2)
    assert "B parameters need some" in shown and "GiB are free here" in shown


def test_layers_are_cut_alike_and_each_kind_is_kept():
    kinds = ["linear", "linear", "linear", "full"] * 3
    config = {
        "num_hidden_layers": 12,
        "layer_types": kinds,
        "mlp_only_layers": [0, 3],
        "sizes": list(range(12)),
        "x": [1],
    }
    content, cut = shrink(config, 2)
    assert content == {
        "num_hidden_layers": 2,
        "layer_types": ["linear", "full"],
        "mlp_only_layers": [0, 1],
        "sizes": [0, 3],
        "x": [1],
    }
    assert cut.kept == (0, 3) and not cut.left_out
    assert shrink(config, 1)[1].left_out == ("full",)
    assert shrink(config, 99)[0]["num_hidden_layers"] == 12


def test_dense_layers_at_the_start_leave_room_for_one_with_experts():
    config = {"text_config": {"num_hidden_layers": 61, "first_k_dense_replace": 3}, "model_type": "x"}
    content, cut = shrink(config, 2)
    assert content["text_config"] == {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    with pytest.raises(ConfigError, match="none of num_hidden_layers"):
        shrink({"depth": 3}, 2)


def test_too_large_a_model_is_refused_with_what_would_fit():
    size = Size(100_000_000_000, 200 * 2**30, 2 * 2**30, (("layers.*.experts.up", 150 * 2**30),))
    check_memory(size, 500 * 2**30, 96)
    with pytest.raises(DeviceError, match=r"100.0 B parameters need some 480.0 GiB") as caught:
        check_memory(size, 48 * 2**30, 96)
    assert "layers=6," in str(caught.value) and "experts.up 150.0 GiB" in str(caught.value)
