"""Users' DeepSpeed keys pass through; what contradicts our settings is named with both values."""

from __future__ import annotations

import json

import pytest

from configs.errors import ConfigError, CrosstuneError
from configs.schema.sharding import ZeroConfig
from train.engine.zero_config import deepspeed_config


def settings(stage=2, precision="bf16", max_grad_norm=1.0, world_size=2, offload=False, **keys):
    config = ZeroConfig(stage=stage, offload_optimizer=offload, deepspeed=keys)
    return deepspeed_config(
        config, world_size=world_size, precision=precision, max_grad_norm=max_grad_norm, model_numel=3_200_000
    )


def test_our_settings():
    got = settings(stage=3, world_size=4, offload=True, max_grad_norm=0.5)
    assert got["zero_optimization"]["stage"] == 3
    assert got["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert got["gradient_clipping"] == 0.5
    assert got["bf16"]["enabled"] and got["communication_data_type"] == "fp32"
    assert got["train_batch_size"] == 4 * got["train_micro_batch_size_per_gpu"] * got["gradient_accumulation_steps"]
    assert settings(precision="fp32")["bf16"] == {"enabled": False}
    assert "offload_optimizer" not in settings()["zero_optimization"]
    assert got["zero_optimization"]["stage3_max_reuse_distance"] == 200_000


def test_user_keys_pass_through_and_win_over_defaults():
    got = settings(wall_clock_breakdown=True, zero_optimization={"reduce_bucket_size": 1000, "overlap_comm": True})
    assert got["wall_clock_breakdown"] is True
    assert got["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True}
    assert settings(gradient_clipping=1.0)["gradient_clipping"] == 1.0, "to repeat our value is no contradiction"


@pytest.mark.parametrize(
    ("keys", "where", "both"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage", ("1", "2")),
        ({"gradient_clipping": 5}, "gradient_clipping", ("5", "1.0")),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps", ("8", "1")),
        ({"bf16": {"enabled": False}}, "bf16.enabled", ("False", "True")),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype", ("bf16", "fp32")),
        ({"bf16": True}, "bf16", ("True", "'enabled': True")),
    ],
)
def test_contradiction_names_both_values(keys, where, both):
    with pytest.raises(ConfigError) as caught:
        settings(**keys)
    assert caught.value.where == f"sharding.deepspeed.{where}"
    assert all(value in caught.value.found for value in both)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"optimizer": {"type": "Lamb", "params": {"lr": 1}}}, "optimizer"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "zero_optimization.offload_param.device"),
    ],
)
def test_what_would_take_training_out_of_our_hands_is_refused(keys, where):
    with pytest.raises(ConfigError) as caught:
        settings(stage=3, **keys)
    assert caught.value.where == f"sharding.deepspeed.{where}"
    assert caught.value.remedy


def test_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean zero_optimization"):
        settings(zero_optimisation={"stage": 2})


def test_all_faults_at_once():
    with pytest.raises(CrosstuneError) as caught:
        settings(gradient_clipping=5, amp={"enabled": True}, wal_clock_breakdown=True)
    assert all(key in str(caught.value.render()) for key in ("gradient_clipping", "amp", "wall_clock_breakdown"))


def test_a_file_written_for_hugging_face_is_welcome(tmp_path):
    file = tmp_path / "ds.json"
    theirs = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "wall_clock_breakdown": False,
    }
    file.write_text(json.dumps(theirs))
    got = settings(file=str(file), zero_optimization={"overlap_comm": False})
    assert got["zero_optimization"]["overlap_comm"] is False, "keys beside the file win over it"
    assert isinstance(got["zero_optimization"]["reduce_bucket_size"], int)
    assert "optimizer" not in got and "fp16" not in got and got["bf16"]["enabled"] is True


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_file_that_cannot_be_used(tmp_path, content):
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        settings(file=str(file))
    assert caught.value.where == "sharding.deepspeed.file" and "ds.json" in caught.value.found
