"""`crosstune prove layout`: one global step has one gradient, however its samples are laid out.

The gradient is read from the checkpoint: the momentum of plain gradient descent is the (decayed) sum of the gradients.
Two steps are taken, since the first one leaves half of LoRA's matrices without a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.compose import amend
from configs.errors import CrosstuneError, DeviceError
from configs.schema.prove import ProveLayoutConfig
from configs.schema.roots import Packing, TrainConfig
from launchers.accelerator import check_processes
from launchers.prove.proof import Part, Proof
from launchers.prove.setting import Change, Setting, layout_name, setting_of, under_layout
from train.prove.comparison import Comparison, close_figure, equal_figure

PROMISE = "the gradient of a global step does not depend on packing, accumulation, ranks or engine"
STEPS = 2
OPTIMIZER = ("optim=sgd", "optim.lr=0.1", "optim.momentum=0.9", "optim.max_grad_norm=1")
TWO_RANKS = "plainx2"
GRADIENT = "momentum_buffer"
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}
"""Share of each parameter's gradient norm; bf16 itself rounds every number by up to 4e-3."""
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


def prove_layout(cfg: ProveLayoutConfig, config_dir: Path | None) -> dict[str, Any]:
    """Takes the same steps in several layouts and compares gradients, losses and data with the first.

    Args:
        cfg: of the command.
        config_dir: the user's own options of the sharding group.

    Returns:
        The report; ``exit_code`` 0 if the gradients agree, else 3.

    Raises:
        ConfigError: there is no such layout.
        DeviceError: there are too few devices for one that was asked for.
        CrosstuneError: the first run ended with it.
    """
    setting = setting_of(cfg, steps=STEPS, every=STEPS)
    own = setting.train
    engines = {name: under_layout(own, name, config_dir) for name in cfg.layouts_to}
    for each in (own, *engines.values()):
        check_processes(each)  # all of them before anything slow starts
    _simplify(setting)
    proof = Proof(cfg, "layout", PROMISE, setting, stages=1)
    proof.settle_model(quiet=True)
    proof.more = {"layout": f"compared with plainx1, packing={own.packing.value}", "seed": cfg.seed}
    cases = dict(_cases(setting.train))
    for name, each in {layout_name(own): own, **engines}.items():
        cases |= {} if name == "plainx1" else {name: replace(setting.train, sharding=each.sharding, nproc=each.nproc)}
    proof.stages.total += len(cases)
    with proof.stages.stage("plainx1, packed as the config says"):
        reference = proof.train("reference", setting.train)
    for title, case in cases.items():
        part = Part(title)
        proof.parts.append(part)
        with proof.stages.stage(title):
            _try(proof, part, case, reference)
    return proof.finish(reference)


def _simplify(setting: Setting) -> None:
    """The reference: one rank of the plain engine, and an optimizer whose state is the gradient."""
    own = setting.train
    setting.change("eval_every", 0, "of no matter here")
    setting.change("batch_tokens", max(own.batch_tokens, 2 * own.max_length), "something to accumulate")
    setting.train = under_layout(setting.train, "plainx1", None)
    if layout_name(own) != "plainx1":
        setting.changes.append(
            Change("sharding, nproc", layout_name(own), "plainx1", "what the others are held against")
        )
    setting.train = amend(setting.train, [*OPTIMIZER, "schedule=constant"])
    setting.changes += [
        Change("optim", own.optim._target_, " ".join(OPTIMIZER), "its momentum is the gradient"),
        Change("schedule", own.schedule._target_, "constant", "two steps need none"),
    ]


def _cases(cfg: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """What any config can be compared under."""
    if cfg.packing is not Packing.off:
        yield "padded rows", replace(cfg, packing=Packing.off)
    if cfg.max_length < cfg.micro_batch_tokens:
        less, size = "more", cfg.max_length
    else:
        less, size = "less", 2 * cfg.micro_batch_tokens
    yield f"{less} accumulation: micro_batch_tokens={size}", replace(cfg, micro_batch_tokens=size)
    yield TWO_RANKS, replace(cfg, nproc=2)


def _try(proof: Proof, part: Part, case: TrainConfig, reference: Path) -> None:
    """Takes the steps in one layout; a case that nobody asked for may be more than this machine has devices for."""
    try:
        check_processes(case)
    except DeviceError as error:
        part.left_out = True
        part.notes.append(error.render())
        return
    try:
        run_dir = proof.train("".join(letter if letter.isalnum() else "-" for letter in part.title), case)
    except CrosstuneError as error:
        part.failure = error.render()
        return
    proof.compare(part, lambda: _compared(reference, run_dir))


def _compared(reference: Path, run_dir: Path) -> Iterator[Comparison]:
    from train.checkpoint.layout import step_folder
    from train.observe.metrics import read_metrics
    from train.prove.tensors import close_tensors
    from train.run_folder import RunFolder

    ours, theirs = RunFolder(reference), RunFolder(run_dir)
    precision = ours.read_record().precision
    expected, found = read_metrics(ours.metrics), read_metrics(theirs.metrics)
    yield equal_figure("data_hash", expected, found)
    yield close_figure("loss", expected, found, LOSS_TOLERANCE[precision])
    last, other = (step_folder(run.checkpoints, STEPS) for run in (ours, theirs))
    yield close_tensors(last, other, GRADIENT, TOLERANCE[precision])
