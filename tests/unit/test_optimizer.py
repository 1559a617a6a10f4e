"""The optimizer of the optim group."""

from __future__ import annotations

import torch

from configs.schema.optim import AdamWConfig
from train.engine.optimizer import build_optimizer


def test_weight_decay_acts_on_matrices_only():
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in {"w": (2, 3), "b": (3,)}.items()}
    optimizer = build_optimizer(AdamWConfig(lr=0.5, weight_decay=0.1), parameters.items())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(parameters["w"], torch.full((2, 3), 0.95)) and parameters["b"].eq(1).all()
