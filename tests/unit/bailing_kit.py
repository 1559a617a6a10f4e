"""Tiny models of Ling 2.x and Ming, and the same computed in fp64 by plain loops from the published weights.

The reference shares nothing with `train/models/bailing_moe_v2`: it reads a safetensors file by its published names.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests import tiny_families

CONFIGS = {name: tiny_families.CONFIGS[name] for name in ("bailing_moe_v2", "bailingmm_moe_v2_lite")}


def language_config(name: str) -> dict[str, Any]:
    """The values of the language model."""
    values = CONFIGS[name][1]
    return copy.deepcopy(values.get("llm_config", values))


def build(name: str, *, seed: int = 0, attention: str | None = None, **changes: Any) -> Any:
    """A random model in fp32 and eval mode; `changes` are to the config of the language model."""
    from train.models.bailing_moe_v2 import ming, modeling, register

    register()
    class_name, values = CONFIGS[name]
    kind = getattr(modeling, class_name, None) or getattr(ming, class_name)
    language = language_config(name) | copy.deepcopy(changes)  # transformers writes into what it is given
    config = kind.config_class(**(values | {"llm_config": language} if "llm_config" in values else language))
    config.architectures = [class_name]
    if attention:
        config._attn_implementation = attention
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for part, tensor in [*model.named_parameters(), *model.named_buffers()]:  # zeros and ones show no fault
            if part.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.3)
            elif part.endswith(("norm.weight", "layernorm.weight")):
                tensor.add_(torch.randn_like(tensor), alpha=0.2)
    model.config.use_cache = False
    return model.eval()


class Reference:
    """One row at a time, one token at a time, one head at a time.

    Args:
        folder: with model.safetensors under published names.
        config: of the language model.
        prefix: of the language model's names.
        faults: what to compute wrongly, to prove that a test would see it.
    """

    def __init__(self, folder: Path, config: dict[str, Any], prefix: str = "", faults: frozenset[str] = frozenset()):
        self.weights = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
        self.c = config
        self.prefix = prefix
        self.faults = faults
        self.d = config["head_dim"]
        self.rotated = self.d if "all_rotated" in faults else int(self.d * config["partial_rotary_factor"])

    def logits(self, ids: list[int], gates: list[str] | None = None, positions: Any = None) -> torch.Tensor:
        """``[t x vocabulary]``.

        Args:
            ids: of the tokens.
            gates: each token's router; None: that for text.
            positions: each token's in time, height and width; None: the same three from 0.
        """
        gates = gates or ["gate"] * len(ids)
        positions = positions or [(i, i, i) for i in range(len(ids))]
        table = self._get("model.word_embeddings.weight")
        xs = [table[i] for i in ids]
        for layer in range(self.c["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            mixed = self._attention(at + "attention.", [self._norm(x, at + "input_layernorm") for x in xs], positions)
            xs = [x + y for x, y in zip(xs, mixed, strict=True)]
            for i, x in enumerate(xs):
                h = self._norm(x, at + "post_attention_layernorm")
                dense = layer < self.c["first_k_dense_replace"]
                xs[i] = x + (self._mlp(at + "mlp.", h) if dense else self._experts(at + "mlp.", h, gates[i]))
        head = self._get("lm_head.weight")
        return torch.stack([head @ self._norm(x, "model.norm") for x in xs])

    def _get(self, name: str) -> torch.Tensor:
        return self.weights[self.prefix + name]

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / math.sqrt(float((x * x).mean()) + self.c["rms_norm_eps"]) * self._get(name + ".weight")

    def _mlp(self, at: str, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._get(at + "gate_proj.weight") @ x, self._get(at + "up_proj.weight") @ x
        return self._get(at + "down_proj.weight") @ (gate * torch.sigmoid(gate) * up)

    def _attention(self, at: str, xs: list[torch.Tensor], positions: Any) -> list[torch.Tensor]:
        heads, groups, d = self.c["num_attention_heads"], self.c["num_key_value_heads"], self.d
        q_norm, k_norm = ("q_norm", "k_norm") if self.prefix else ("query_layernorm", "key_layernorm")
        queries, keys, values = [], [], []
        for x, position in zip(xs, positions, strict=True):
            parts = (self._get(at + "query_key_value.weight") @ x).split(d)
            queries.append([self._turned(part, at + q_norm, position) for part in parts[:heads]])
            keys.append([self._turned(part, at + k_norm, position) for part in parts[heads : heads + groups]])
            values.append(parts[heads + groups :])
        out = []
        for i, query in enumerate(queries):
            row = []
            for head in range(heads):
                group = head // (heads // groups)
                scores = [float(query[head] @ keys[j][group]) / math.sqrt(d) for j in range(i + 1)]
                powers = [math.exp(s - max(scores)) for s in scores]
                row.append(sum(p / sum(powers) * values[j][group] for j, p in enumerate(powers)))
            out.append(self._get(at + "dense.weight") @ torch.cat(row))
        return out

    def _turned(self, part: torch.Tensor, norm: str, position: tuple[int, int, int]) -> torch.Tensor:
        part = part if "no_qk_norm" in self.faults else self._norm(part, norm)
        out, half = part.clone(), self.rotated // 2
        section = (self.c.get("rope_scaling") or {}).get("mrope_section", [half, 0, 0])
        for j in range(half):
            in_space = j < section[1] + section[2]
            axis = (1 if j % 2 == 0 else 2) if in_space else 0
            angle = position[axis] * self.c["rope_theta"] ** (-2 * j / self.rotated)
            a, b = part[j], part[j + half]
            out[j] = a * math.cos(angle) - b * math.sin(angle)
            out[j + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def _experts(self, at: str, x: torch.Tensor, gate: str) -> torch.Tensor:
        count, groups = self.c["num_experts"], self.c["n_group"]
        scores = torch.sigmoid(self._get(f"{at}{gate}.weight") @ x).tolist()
        bias = self._get(f"{at}{gate}.expert_bias").tolist()
        liked = [s + b for s, b in zip(scores, bias, strict=True)]
        size = count // groups
        best_of = [sum(sorted(liked[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: best_of[g])[-self.c["topk_group"] :]
        allowed = [e for e in range(count) if e // size in kept or "no_groups" in self.faults]
        chosen = sorted(allowed, key=lambda e: liked[e])[-self.c["num_experts_per_tok"] :]
        weights = {e: liked[e] if "bias_in_weights" in self.faults else scores[e] for e in chosen}
        scale = 1.0 if "no_scaling" in self.faults else self.c["routed_scaling_factor"]
        out = self._mlp(at + "shared_experts.", x)
        for expert, weight in weights.items():
            out = out + scale * weight / sum(weights.values()) * self._mlp(f"{at}experts.{expert}.", x)
        return out
