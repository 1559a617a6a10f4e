"""A model that nobody listed trains by the safe path and is told so: one sample a row, padding on the right."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from configs.compose import compose
from configs.errors import ConfigError
from configs.schema.device import DeviceConfig
from configs.schema.optim import OptimConfig
from configs.schema.outputs import ExportConfig
from configs.schema.sharding import ZeroConfig
from tests.command import final_weights, metrics_of
from tests.tiny import samples_of, save_tiny_tokenizer, write_prepared
from train.devices.cpu import CpuDevice
from train.engine.base import World
from train.engine.zero import ZeroEngine
from train.export.run import export
from train.run import train
from train.run_folder import RunFolder


class HomemadeConfig(PretrainedConfig):
    model_type = "homemade"

    def __init__(
        self, vocab_size: int = 320, hidden_size: int = 32, num_hidden_layers: int = 2, **rest: object
    ) -> None:
        super().__init__(**rest)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers


class Mixer(nn.Module):
    """Averages over all tokens so far: it knows no boundaries, so packed samples would leak into each other."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.into, self.out, self.router = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, 4)

    def forward(self, x_BTD: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        inside = self.into(x_BTD) * self.router(x_BTD).softmax(-1)[..., :1]
        if mask_BT is not None:
            inside = inside * mask_BT[..., None]
        counts = torch.arange(1, x_BTD.shape[1] + 1)[:, None]
        return x_BTD + self.out(torch.tanh(inside.cumsum(1) / counts))


class HomemadeForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = HomemadeConfig

    def __init__(self, config: HomemadeConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mixers = nn.ModuleList(Mixer(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs) -> CausalLMOutput:
        assert "pack" not in kwargs
        x = self.table(input_ids)
        for mixer in self.mixers:
            x = mixer(x, attention_mask)
        return CausalLMOutput(logits=self.head(x[logits_to_keep] if torch.is_tensor(logits_to_keep) else x))


@pytest.fixture(scope="module")
def homemade(tmp_path_factory):
    AutoConfig.register("homemade", HomemadeConfig)
    AutoModelForCausalLM.register(HomemadeConfig, HomemadeForCausalLM)
    tmp = tmp_path_factory.mktemp("homemade")
    torch.manual_seed(0)
    HomemadeForCausalLM(HomemadeConfig()).save_pretrained(tmp / "model")
    save_tiny_tokenizer(tmp / "model")
    write_prepared(tmp / "data", {"train": samples_of((24, 31, 18, 40, 27, 22), vocab_size=12)})
    return tmp


def run(tmp: Path, name: str, *overrides: str) -> RunFolder:
    folder = tmp / name
    folder.mkdir()
    words = [f"model.path={tmp / 'model'}", f"dataset.path={tmp / 'data'}", f"run_dir={folder}", "device=cpu"]
    sizes = ["batch_tokens=120", "micro_batch_tokens=120", "max_length=120", "max_steps=12", "optim.lr=0.03"]
    cfg = compose("train", [*words, *sizes, "model.precision=fp32", "dataset.license=CC0-1.0", *overrides])
    train(cfg, model_dir=tmp / "model", prepared=tmp / "data", run_dir=folder)
    return RunFolder(folder)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_it_trains_and_is_exported_and_the_safe_path_is_told(homemade, tuning, caplog):
    caplog.set_level(logging.INFO)
    done = run(homemade, tuning, f"tuning={tuning}")
    assert "family 'homemade' is not one that crosstune knows" in caplog.text and "one sample" in caplog.text
    losses = [line["loss"] for line in metrics_of(done.path)]
    assert losses[-1] < 0.8 * losses[0]
    names = set(final_weights(done.path))
    if tuning == "lora":
        adapted = {n.split(".lora_")[0].rpartition(".")[2] for n in names}
        assert adapted == {"into", "out"}, "neither head nor router"
    else:
        assert names == set(dict(HomemadeForCausalLM(HomemadeConfig()).named_parameters()))
    out = export(done, ExportConfig(), on_note=lambda text: None)
    base, merged = (load_file(f / "model.safetensors") for f in (homemade / "model", out.merged))
    assert base.keys() == merged.keys() and not torch.equal(base["mixers.0.out.weight"], merged["mixers.0.out.weight"])
    assert json.loads((out.merged / "config.json").read_text())["model_type"] == "homemade"


def test_rows_of_one_sample_padded_rows_and_single_samples_give_the_same_losses(homemade):
    """Padded on the right, so that nothing flows from the padding into a sample."""
    small = ["max_steps=3", "tuning=full", "optim.lr=0.001"]
    auto = run(homemade, "auto", *small)
    padded = run(homemade, "padded", *small, "packing=off")
    for a, b in zip(metrics_of(auto.path), metrics_of(padded.path), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["data_hash"] == b["data_hash"]


def test_packing_it_by_name_is_refused(homemade):
    with pytest.raises(ConfigError, match="packing: on, but family 'homemade' is not one that crosstune"):
        run(homemade, "packed", "packing=on")


def test_experts_of_their_own_are_refused_where_sums_would_mix_up_their_gradients():
    """Stage 1 and 2 sum gradients as they arrive; a rank whose tokens miss an expert has none for it."""
    model = nn.Module()
    model.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    whole = nn.ModuleDict({"layer": model})
    given = {"optim": OptimConfig(), "device": CpuDevice(DeviceConfig()), "world": World(0, 2)}
    with pytest.raises(
        ConfigError, match="sharding: zero2 on 2 ranks[\\s\\S]*layer.experts.0.weight[\\s\\S]*plain, zero3"
    ):
        ZeroEngine(ZeroConfig(stage=2), whole, working_dtype=torch.float32, **given)
