"""The sharding group -> DeepSpeed's configuration. Pure: nothing here imports DeepSpeed or torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from configs.errors import ConfigError, CrosstuneError, nearest, raise_all
from configs.schema.sharding import ZeroConfig

WHERE = "sharding.deepspeed"

KNOWN_KEYS = frozenset(
    "activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comms_logger communication_data_type "
    "compile compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last "
    "disable_allgather disable_python_gc dump_state elasticity eigenvalue expert_parallel flops_profiler fp16 "
    "gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor graph_harvesting "
    "hybrid_engine keep_in_fp32_modules managed_gradient_accumulation memory_breakdown monitor_config nebula "
    "optimizer pipeline prescale_gradients progressive_layer_drop scheduler seq_parallel_communication_data_type "
    "sequence_parallel_size sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers "
    "torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism "
    "use_node_local_storage wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer zero_optimization".split()
)
"""Top-level keys that DeepSpeed 0.19 reads; it ignores any other without a word."""

REFUSED = {
    "amp": "precision is chosen by model.precision",
    "torch_autocast": "precision is chosen by model.precision",
    "fp16": "fp16 is not offered; model.precision=bf16 or fp32",
    "bfloat16": "precision is chosen by model.precision",
    "optimizer": "the optimizer is chosen by the optim group",
    "scheduler": "the learning rate is chosen by the schedule group",
    "activation_checkpointing": "use activation_checkpointing=true of the train config",
    "checkpoint": "checkpoints are written by the checkpoint group",
    "nebula": "checkpoints are written by the checkpoint group",
    "elasticity": "a checkpoint resumes at any number of processes already",
    "autotuning": "it starts runs of its own",
    "pipeline": "pipeline parallelism is not offered",
    "tensor_parallel": "tensor parallelism is not offered",
    "sequence_parallel_size": "sequence parallelism is not offered",
    "sparse_gradients": "gradients are dense",
    "gradient_allreduce_op": "gradients are summed by the engine",
    "prescale_gradients": "gradients are summed by the engine",
    "gradient_predivide_factor": "gradients are summed by the engine",
    "managed_gradient_accumulation": "the batch plan decides the micro-batches",
    "curriculum_learning": "the batch plan decides the data order",
    "data_efficiency": "the batch plan decides the data order",
    "compression_training": "it changes the model",
    "progressive_layer_drop": "it changes the model",
    "hybrid_engine": "it changes the model",
    "zero_optimization.zenflow": "a checkpoint could not hold its state",
    "zero_optimization.mics_shard_size": "a checkpoint could not hold its layout",
    "zero_optimization.zero_hpz_partition_size": "a checkpoint could not hold its layout",
    "zero_optimization.zero_quantized_weights": "gradients would not equal the plain engine's",
    "zero_optimization.zero_quantized_nontrainable_weights": "gradients would not equal the plain engine's",
    "zero_optimization.zero_quantized_gradients": "gradients would not equal the plain engine's",
    "zero_optimization.cpu_offload": "use sharding.offload_optimizer=true",
    "zero_optimization.offload_optimizer.ratio": "a checkpoint could not hold its state",
    "zero_optimization.offload_optimizer.super_offload": "a checkpoint could not hold its state",
    "data_types.buffer_dtype": "buffers keep the precision that the model gives them",
    "bf16.bf16_master_weights_and_grads": "master weights are fp32",
    "bf16.bf16_optimizer_states": "optimizer state is fp32",
    "bf16.immediate_grad_update": "gradients are added up after each backward pass",
}
"""Keys that would take something out of our hands, by dotted path, and why they cannot be had."""

AUTO = "auto"
"""Hugging Face's word for "what the trainer says"."""


def deepspeed_config(
    config: ZeroConfig,
    *,
    world_size: int,
    precision: Literal["fp32", "bf16"],
    max_grad_norm: float,
    model_numel: int,
    pin_memory: bool = False,
) -> dict[str, Any]:
    """Our settings with the user's keys added.

    Args:
        config: the sharding group.
        world_size: processes.
        precision: of the working weights.
        max_grad_norm: from the optim group; 0 is off.
        model_numel: elements of all parameters.
        pin_memory: whether host buffers of the offload are pinned; of no use on a CPU.

    Returns:
        What ``deepspeed.initialize(config=...)`` takes.

    Raises:
        ConfigError: an unknown key, or one that contradicts our settings (all such in one `ErrorGroup`).
    """
    user = user_keys(config)
    settings = _settings(config, world_size, precision, max_grad_norm)
    faults = _unknown(user) + _refused(user) + _contradictions(user, settings)
    raise_all(faults)
    return _merge(_merge(_defaults(config, model_numel, pin_memory), user), settings)


def _settings(config: ZeroConfig, world_size: int, precision: str, max_grad_norm: float) -> dict[str, Any]:
    """What correctness rests on; a user may repeat it, not change it."""
    settings: dict[str, Any] = {
        # Nominal: the batch plan has micro-batches of uneven size and number, and the engine marks the last one.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": max_grad_norm,
        # torch's own optimizer works on every device; DeepSpeed's are compiled for minutes at first use.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": config.stage},
    }
    if config.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if precision == "bf16":
        # A gradient that is not finite must not reach the weights, as under the plain engine.
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    else:
        settings["bf16"] = {"enabled": False}
    return settings


def _defaults(config: ZeroConfig, model_numel: int, pin_memory: bool) -> dict[str, Any]:
    """What a user may change freely."""
    # DeepSpeed's own 5e8 elements would take 2 GB of device memory for the fp32 gradients on their way.
    zero: dict[str, Any] = {"reduce_bucket_size": 50_000_000}
    if config.stage == 3:
        # How far ahead a further use keeps a weight gathered: about two layers. DeepSpeed's 1e9 elements are a whole
        # small model, and its search for them, quadratic in the modules, took a minute on a LoRA model of 135M.
        zero["stage3_max_reuse_distance"] = min(1_000_000_000, max(1, model_numel // 16))
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"pin_memory": pin_memory}
    return {"steps_per_print": 2**31 - 1, "zero_optimization": zero}


def user_keys(config: ZeroConfig) -> dict[str, Any]:
    """``sharding.deepspeed`` with its ``file`` read beneath it, and without what is left to us (``"auto"``).

    Raises:
        ConfigError: the file is not there or holds no JSON object.
    """
    keys = dict(config.deepspeed)
    file = keys.pop("file", None)
    if file is not None:
        keys = _merge(_read(Path(str(file)).expanduser()), keys)
    return _without_auto(keys)


def _read(path: Path) -> dict[str, Any]:
    where = f"{WHERE}.file"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(where, f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(where, f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(where, f"{path} holds {type(content).__name__}", allowed="one JSON object")
    return content


def _without_auto(keys: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in keys.items():
        if isinstance(value, dict):
            if value and (_left_to_us(value) or not (value := _without_auto(value))):
                continue
        elif value == AUTO:
            continue
        kept[key] = value
    return kept


def _left_to_us(section: dict[str, Any]) -> bool:
    """``{"enabled": "auto", ...}``, and an optimizer or scheduler whose every parameter is "auto"."""
    params = section.get("params")
    return section.get("enabled") == AUTO or (isinstance(params, dict) and all(v == AUTO for v in params.values()))


def _unknown(user: dict[str, Any]) -> list[CrosstuneError]:
    faults: list[CrosstuneError] = []
    for key in user:
        if key not in KNOWN_KEYS:
            near = nearest(key, KNOWN_KEYS)
            remedy = f"did you mean {near}?" if near else None
            faults.append(ConfigError(f"{WHERE}.{key}", "not a key of DeepSpeed", remedy=remedy))
    return faults


def _refused(user: dict[str, Any]) -> list[CrosstuneError]:
    faults: list[CrosstuneError] = []
    for path, value in _leaves_and_sections(user):
        if path in REFUSED and not _is_off(value):
            faults.append(ConfigError(f"{WHERE}.{path}", repr(value), remedy=f"remove it: {REFUSED[path]}"))
        elif value == "nvme":
            faults.append(ConfigError(f"{WHERE}.{path}", repr(value), allowed="cpu", remedy="NVMe is not offered"))
    return faults


def _is_off(value: Any) -> bool:
    """``false``, ``null`` or a section that is disabled: the same as leaving it out."""
    return value in (None, False) or (isinstance(value, dict) and value.get("enabled") is False)


def _contradictions(user: dict[str, Any], settings: dict[str, Any], prefix: str = "") -> list[CrosstuneError]:
    faults: list[CrosstuneError] = []
    for key, ours in settings.items():
        if key not in user:
            continue
        path, theirs = f"{prefix}{key}", user[key]
        if isinstance(ours, dict) and isinstance(theirs, dict):
            faults += _contradictions(theirs, ours, f"{path}.")
        elif theirs != ours:
            faults.append(
                ConfigError(
                    f"{WHERE}.{path}",
                    f"{theirs!r} contradicts {ours!r}",
                    remedy=f"remove it: {REASONS.get(path, 'crosstune sets it')}",
                )
            )
    return faults


REASONS = {
    "train_micro_batch_size_per_gpu": "micro_batch_tokens decides",
    "gradient_accumulation_steps": "batch_tokens and micro_batch_tokens decide",
    "train_batch_size": "batch_tokens decides",
    "gradient_clipping": "optim.max_grad_norm decides",
    "communication_data_type": "gradients are summed in fp32",
    "data_types.grad_accum_dtype": "gradients are added up in fp32",
    "zero_optimization.stage": "sharding.stage decides",
    "zero_optimization.offload_optimizer.device": "sharding.offload_optimizer decides",
    "bf16.enabled": "model.precision decides",
}
"""Who decides about a setting, by dotted path."""


def _leaves_and_sections(keys: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in keys.items():
        found.append((f"{prefix}{key}", value))
        if isinstance(value, dict):
            found += _leaves_and_sections(value, f"{prefix}{key}.")
    return found


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A new dict in which `over` wins, section by section."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged
