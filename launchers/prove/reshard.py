"""`crosstune prove reshard`: saved by one engine on so many ranks, resumed by others on other numbers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.compose import save_resolved
from configs.schema.prove import ProveReshardConfig, as_config_of
from configs.schema.roots import TrainConfig
from launchers.accelerator import check_processes
from launchers.prove.kills import ends_well
from launchers.prove.proof import Part, Proof
from launchers.prove.runs import Command
from launchers.prove.setting import layout_name, layout_words, setting_of, under_layout
from launchers.torchrun import new_attempt, run_workers
from train.prove.comparison import Comparison, close_figure, equal_figure

PROMISE = "a checkpoint of one engine on so many ranks is the same, bit by bit, to another on another number of ranks"
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
"""Of the losses that follow: other ranks sum in another order."""
RELOADED = "reloaded"


def prove_reshard(cfg: ProveReshardConfig, config_dir: Path | None) -> dict[str, Any]:
    """Trains under one layout and goes on from its checkpoint under that and under the others.

    Args:
        cfg: of the command.
        config_dir: the user's own options of the sharding group.

    Returns:
        The report; ``exit_code`` 0 if weights and moments are equal and the losses close, else 3.

    Raises:
        ConfigError: there is no such layout.
        DeviceError: there are too few devices for one.
        CrosstuneError: the run that saves ended with it.
    """
    saved_at = cfg.steps // 2
    setting = setting_of(cfg, steps=cfg.steps, every=saved_at)
    if cfg.layout_from:
        setting.train = under_layout(setting.train, cfg.layout_from, config_dir)
    for each in (setting.train, *(under_layout(setting.train, name, config_dir) for name in cfg.layouts_to)):
        check_processes(each)  # all of them before anything slow starts
    setting.change("checkpoint.keep_last", 0, "the checkpoint in the middle is needed")
    proof = Proof(cfg, "reshard", PROMISE, setting, stages=1 + len(cfg.layouts_to))
    proof.settle_model(quiet=True)
    origin = cfg.layout_from or layout_name(setting.train)
    proof.more = {"layout": f"saved under {origin}", "saved_at_step": saved_at, "seed": cfg.seed}
    with proof.stages.stage(f"{origin}: {cfg.steps} steps, saved at step {saved_at}"):
        reference = proof.train("saved", proof.setting.train)
    memory: dict[str, Any] = {}
    for name in cfg.layouts_to:
        with proof.stages.stage(f"{name}: load, save again, go on"):
            part = Part(f"{origin} -> {name}")
            proof.parts.append(part)
            memory[name] = _resumed_under(proof, part, name, reference, saved_at, config_dir)
    proof.more |= {"load_memory": memory}
    return proof.finish(reference)


def _resumed_under(
    proof: Proof, part: Part, name: str, reference: Path, saved_at: int, config_dir: Path | None
) -> list[dict[str, float]]:
    """Loads, saves and goes on; returns the memory that loading took, by rank."""
    run_dir = _copy_of_run(reference, proof.run_of(name), saved_at)
    cfg = under_layout(proof.setting.train, name, config_dir)
    if fault := ends_well(_reload_command(proof, name, cfg, run_dir)):
        part.failure = f"loading: {fault.render()}"
        return []
    proof.compare(part, lambda: _reloaded(reference, run_dir, saved_at))
    memory: list[dict[str, float]] = json.loads((run_dir / RELOADED / "memory.json").read_text(encoding="utf-8"))
    extra, held = (max(each[key] for each in memory) for key in ("extra_mib", "held_mib"))
    part.notes.append(
        f"loading took at most {extra:,.0f} MiB of host memory beyond what a rank then holds ({held:,.0f} MiB)"
    )
    shutil.rmtree(run_dir / RELOADED)
    own_options = ["--config-dir", str(config_dir)] if config_dir else []
    words = ["resume", str(run_dir), *layout_words(name), *own_options]
    if fault := ends_well(Command(words, proof.logs, f"{name}-resumed")):
        part.failure = f"resuming: {fault.render()}"
    else:
        proof.compare(part, lambda: _went_on(reference, run_dir, saved_at))
    if part.holds and not proof.cfg.keep_runs:
        shutil.rmtree(run_dir)
    return memory


def _copy_of_run(reference: Path, run_dir: Path, saved_at: int) -> Path:
    """The run as it stood when it saved; the checkpoint's files are links, since no command writes into them."""
    from train.checkpoint.layout import step_folder
    from train.run_folder import RunFolder

    ours, theirs = RunFolder(reference), RunFolder(run_dir)
    theirs.checkpoints.mkdir(parents=True)
    for file in (ours.resolved, ours.record, ours.environment, ours.metrics):
        shutil.copyfile(file, run_dir / file.name)
    shutil.copytree(
        step_folder(ours.checkpoints, saved_at), step_folder(theirs.checkpoints, saved_at), copy_function=_link
    )
    return run_dir


def _link(source: str, target: str) -> None:
    with suppress(OSError):  # a file system without hard links
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def _reload_command(proof: Proof, name: str, cfg: TrainConfig, run_dir: Path) -> Command:
    """`reload` in processes of its own, as a worker of this very command."""
    request = proof.runs / f"{name}.yaml"
    save_resolved(as_config_of(ProveReshardConfig, cfg, run_dir=str(run_dir)), request)
    return Command(["prove", "reshard", "--resume", "--resolved", str(request)], proof.logs, f"{name}-reloaded")


def reload(cfg: ProveReshardConfig, request: Path) -> dict[str, Any]:
    """A run's checkpoint into the engine of `cfg` and out again, in as many processes as it says."""
    run_dir = Path(str(cfg.run_dir))
    if cfg.nproc == 1 or "RANK" in os.environ:
        from train.prove.reload import load_and_save
        from train.run_folder import RunFolder

        load_and_save(cfg, RunFolder(run_dir), run_dir / RELOADED)
    else:
        words = ["prove", "reshard", "--resume", "--resolved", str(request)]
        run_workers(cfg.nproc, words, new_attempt(run_dir / "logs"), threads=cfg.device.threads)
    return {"reloaded": str(run_dir / RELOADED)}


def _reloaded(reference: Path, run_dir: Path, saved_at: int) -> Iterator[Comparison]:
    from train.checkpoint.layout import step_folder
    from train.prove.tensors import equal_checkpoints

    saved, again = (step_folder(folder, saved_at) for folder in (reference / "checkpoints", run_dir / RELOADED))
    yield from equal_checkpoints(saved, again, rng=False)


def _went_on(reference: Path, run_dir: Path, saved_at: int) -> Iterator[Comparison]:
    from train.observe.metrics import read_metrics
    from train.run_folder import RunFolder

    run = RunFolder(reference)
    tolerance = TOLERANCE[run.read_record().precision]
    expected, found = (
        [record for record in read_metrics(folder / "metrics.jsonl") if record["step"] > saved_at]
        for folder in (reference, run_dir)
    )
    yield equal_figure("data_hash", expected, found)
    yield close_figure("loss", expected, found, tolerance)
