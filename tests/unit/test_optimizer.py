"""The optimizer of the optim group."""

from __future__ import annotations

import pytest
import torch

from configs.schema.optim import AdamWConfig, OptimConfig, SGDConfig
from train.engine.optimizer import build_optimizer, is_torchs


@pytest.mark.parametrize("config", [AdamWConfig(lr=0.01, weight_decay=0.1), SGDConfig(lr=0.01)])
def test_a_fused_step_is_the_same_step(config):
    shapes, draw = [(40, 30), (17,)], torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in shapes]
    gradients = [[torch.randn(shape, generator=draw) for shape in shapes] for _ in range(4)]
    ends = []
    for fused in (False, True):
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = build_optimizer(config, zip("wb", parameters, strict=True), fused=fused)
        assert {group["fused"] for group in optimizer.param_groups} == {True if fused else None}
        for each in gradients:
            for parameter, gradient in zip(parameters, each, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameters)
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_an_optimizer_without_a_fused_step_takes_its_own():
    adagrad = OptimConfig(_target_="torch.optim.Adagrad")
    assert not build_optimizer(adagrad, [("w", torch.ones(2, requires_grad=True))], fused=True).param_groups[0]["fused"]


class Derived(torch.optim.AdamW):
    """As others publish them: of torch's class, but without all of its arguments."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, lr=lr, weight_decay=weight_decay)


def test_an_optimizer_derived_from_torchs_gets_no_word_that_nobody_wrote():
    derived = OptimConfig(_target_=f"{__name__}.Derived")
    made = build_optimizer(derived, [("w", torch.ones(2, requires_grad=True))], fused=True)
    assert isinstance(made, Derived) and made.param_groups[0]["fused"] is None
    assert is_torchs(AdamWConfig()) and not is_torchs(derived)


def test_weight_decay_acts_on_matrices_only():
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in {"w": (2, 3), "b": (3,)}.items()}
    optimizer = build_optimizer(AdamWConfig(lr=0.5, weight_decay=0.1), parameters.items())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(parameters["w"], torch.full((2, 3), 0.95)) and parameters["b"].eq(1).all()
