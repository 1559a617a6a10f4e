"""What the engine and resume tests share: a small awkward model, every engine, and uneven batches.

The device is the CPU, or what CROSSTUNE_TEST_DEVICE names (cpu, cuda, ascend, ...).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from configs.compose import build as build_from
from configs.compose import compose
from configs.schema.optim import OptimConfig
from configs.schema.sharding import PlainConfig, ZeroConfig
from tests.distributed.forks import DEVICE_VARIABLE
from train.devices.base import Device
from train.engine.base import Engine, World, init_world
from train.engine.plain import PlainEngine
from train.engine.zero import ZeroEngine

VOCAB = 67
# Small enough that stage 3 both splits and keeps whole parameters; a later key must not move the fragments.
STAGE3 = {"zero_optimization": {"stage3_param_persistence_threshold": 500}}
ENGINES = {
    "plain": PlainConfig(),
    "zero1": ZeroConfig(stage=1),
    "zero2": ZeroConfig(stage=2),
    "zero3": ZeroConfig(stage=3, deepspeed=STAGE3),
    "zero2_offload": ZeroConfig(stage=2, offload_optimizer=True),
}
MORE_ENGINES = {
    "zero1_offload": ZeroConfig(stage=1, offload_optimizer=True),
    "zero3_offload": ZeroConfig(stage=3, offload_optimizer=True, deepspeed=STAGE3),
    "zero2_round_robin": ZeroConfig(stage=2, deepspeed={"zero_optimization": {"round_robin_gradients": True}}),
    "zero3_sub_groups": ZeroConfig(stage=3, deepspeed={"zero_optimization": {"sub_group_size": 3000}}),
}


class Net(torch.nn.Module):
    """A tied model, and trained parameters of one and three elements, fewer than a rank each.

    A Llama; with `experts` a Qwen3-MoE, which holds a layer's experts in parameters of three dimensions.
    """

    def __init__(self, lora: bool, dropout: float = 0.0, experts: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape = {
            "vocab_size": VOCAB,
            "hidden_size": 40,
            "intermediate_size": 54,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "attention_dropout": dropout,
        }
        if experts:
            routing = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 10}
            self.llm = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **routing))
        else:
            self.llm = LlamaForCausalLM(LlamaConfig(**shape))
        if lora:
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
            self.llm = get_peft_model(self.llm, adapters)
        self.scale, self.bias = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.zeros(3))
        self.train()

    def forward(self, input_ids, attention_mask, marker):
        assert marker is MARKER, "keyword objects must arrive as they are"
        out = self.llm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        out.logits = out.logits * self.scale + torch.nn.functional.pad(self.bias, (0, VOCAB - 3))
        return out


MARKER = object()


def build(
    name: str,
    optim: OptimConfig,
    world: World,
    *,
    lora: bool,
    dtype: torch.dtype = torch.float32,
    scramble: bool = False,
    activation_checkpointing: bool = False,
    dropout: float = 0.0,
    experts: int = 0,
) -> Engine:
    """An engine over a new model, whose trained weights are random if `scramble`."""
    model = Net(lora, dropout, experts)
    if activation_checkpointing:
        model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora:
            model.llm.enable_input_require_grads()
    if scramble:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
    config = (ENGINES | MORE_ENGINES)[name]
    cls = PlainEngine if isinstance(config, PlainConfig) else ZeroEngine
    engine = cls(config, model, optim=optim, device=DEVICE, world=world, working_dtype=dtype)
    watch_gradients(engine)
    return engine


def watch_gradients(engine: Engine) -> None:
    """Counts on which kind of device gradients arrive, in ``engine.gradients_on``."""
    engine.gradients_on = Counter()
    for parameter in engine.trained.values():
        parameter.register_hook(lambda gradient: engine.gradients_on.update([gradient.device.type]))


def must_lie_on_device(engine: Engine) -> None:
    """Every trained tensor, gradient and optimizer state is where it belongs, and the backend is the device's own."""
    own = DEVICE.torch_device
    weights = {str(parameter.device) for parameter in engine.trained.values()}
    assert weights == {str(own)}, weights
    assert set(engine.gradients_on) == {own.type}, engine.gradients_on
    offloaded = getattr(engine.config, "offload_optimizer", False)
    kept = {(kind, str(f.view(kind).device)) for f in engine.fragments(owned=False) for kind in f.kinds}
    assert {place for _, place in kept} == {"cpu" if offloaded else str(own)}, kept
    if dist.is_initialized():
        assert dist.get_backend() == DEVICE.backend, dist.get_backend()


def run_step(engine: Engine, step: int, lr: float, micro_batches: int = 2, poison: float = 1.0) -> tuple[float, float]:
    """One global step of seven samples, 3 to 40 tokens long; returns its loss and gradient norm.

    The samples go round over (rank, micro-batch), so that with eight places one of them is empty.
    """
    world = engine.world
    generator = torch.Generator().manual_seed(1000 + step)
    samples = [torch.randint(0, VOCAB, (n,), generator=generator) for n in (40, 3, 17, 5, 29, 4, 11)]
    supervised = sum(len(sample) - 1 for sample in samples)
    total = 0.0
    for i in range(micro_batches):
        mine = samples[world.rank * micro_batches + i :: world.size * micro_batches]
        loss = _loss_sum(engine, mine) / supervised * poison
        engine.backward(loss, last=i == micro_batches - 1)
        total += loss.item()
    norm = engine.step(lr)
    return world.all_reduce_sum([total])[0], norm


def _loss_sum(engine: Engine, samples: list[torch.Tensor]) -> torch.Tensor:
    """Summed over the tokens; a micro-batch without samples still goes through the model, as a weightless one."""
    weight = 1.0 if samples else 0.0
    rows = samples or [torch.zeros(2, dtype=torch.long)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(DEVICE.torch_device)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    mask = mask.to(DEVICE.torch_device)
    labels = ids.masked_fill(mask == 0, -100)[:, 1:]
    logits = engine.forward(input_ids=ids, attention_mask=mask, marker=MARKER).logits[:, :-1].float()
    return weight * torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), reduction="sum")


def _device() -> Device:
    name = os.environ.get(DEVICE_VARIABLE, "cpu")
    return build_from(
        compose("train", ["model.path=.", "dataset.path=.", f"device={name}", "device.threads=1"]).device, Device
    )


DEVICE = _device()


def start() -> World:
    """Called by a worker before anything else."""
    DEVICE.activate(int(os.environ.get("LOCAL_RANK", "0")))
    return init_world(DEVICE)


def launch(module: str, ranks: int, environment: Mapping[str, str] = os.environ, **arguments: object) -> None:
    """Runs ``module`` as that many processes under torchrun; its output is the message if it fails.

    `environment` is the whole environment, such as a stand-in's, which must be there before Python starts. Ranks that
    need none are had cheaper from `tests/distributed/forks.py`.
    """
    command = [sys.executable, "-P"]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", module, json.dumps(arguments)]
    root = str(Path(__file__).parents[2])
    env = {key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([*paths, root])}
    done = subprocess.run(
        command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-6000:]
