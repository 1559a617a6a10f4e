"""`crosstune prove resume`: killed at random moments and resumed, a run ends as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from configs.schema.prove import ProveResumeConfig
from launchers.prove.kills import Kill, Moment, Rhythm, clear, draw, ends_well, kill_at, newest
from launchers.prove.proof import Part, Proof
from launchers.prove.runs import Command
from launchers.prove.setting import layout_name, setting_of
from train.prove.comparison import Comparison, equal_figures, steps_in_order

PROMISE = "a run that is killed at random moments and resumed ends with the same bits as one that is not"


def prove_resume(cfg: ProveResumeConfig) -> dict[str, Any]:
    """Trains once in peace and once under kills, and compares the two.

    Returns:
        The report; ``exit_code`` 0 if all is equal, else 3.

    Raises:
        CrosstuneError: the run without a kill ended with it.
    """
    seed = cfg.kill_seed if cfg.kill_seed is not None else random.SystemRandom().randrange(2**31)
    every = max(1, cfg.steps // 4)
    proof = Proof(cfg, "resume", PROMISE, setting_of(cfg, steps=cfg.steps, every=every), stages=3)
    proof.settle_model(quiet=False)
    proof.more = {"layout": layout_name(proof.setting.train), "kill_seed": seed}
    rhythm = Rhythm()
    with proof.stages.stage("a run without a kill"):
        reference = proof.train("reference", proof.setting.train, on_look=rhythm.look)
        rhythm.step_seconds = _step_seconds(reference)
    part = Part(f"after kills at moments drawn with kill_seed={seed}")
    proof.parts.append(part)
    with proof.stages.stage(f"the same run, killed {cfg.kills} time{'s' if cfg.kills > 1 else ''} and resumed"):
        moments = draw(seed, cfg.kills, cfg.steps, every)
        kills = _killed_run(proof, part, moments, rhythm, every)
    proof.more |= {"kills": [kill.to_json() for kill in kills]}
    with proof.stages.stage("comparison"):
        if part.failure is None:
            proof.compare(part, lambda: _compared(reference, proof.run_of("killed"), cfg.steps))
        if not part.holds and part.failure is None:
            _tell_whether_repeatable(proof, part, reference)
    return proof.finish(reference)


def _step_seconds(run_dir: Path) -> float:
    from train.observe.metrics import read_metrics

    seconds: list[float] = [
        each["tokens"] / each["tokens_per_second"]
        for each in read_metrics(run_dir / "metrics.jsonl")[1:]
        if each["tokens"]  # none in a step that was left out after a spike
    ]
    return fmean(seconds)


def _killed_run(proof: Proof, part: Part, moments: list[Moment], rhythm: Rhythm, every: int) -> list[Kill]:
    """Kills and resumes until the run is done; a fault on the way is the part's failure."""
    run_dir = proof.run_of("killed")
    kills: list[Kill] = []
    for moment in moments:
        command = _go_on(proof, len(kills))
        kill = kill_at(moment, command, run_dir, rhythm, every)
        if kill is None:
            if fault := ends_well(command):
                part.failure = f"after {len(kills)} kills: {fault.render()}"
            part.notes.append(f"{moment}: the run had ended before")
            break
        kills.append(kill)
        part.notes.append(str(kill))
        proof.stages.note(str(kill))
    else:
        if fault := ends_well(_go_on(proof, len(kills))):
            part.failure = f"after {len(kills)} kills: {fault.render()}"
    if not kills and part.failure is None:
        part.failure = "no kill came before the run's end; more steps=, or larger ones, make it longer"
    elif part.failure is None and not any(kill.goes_on_from for kill in kills):
        part.failure = "every kill came before the first checkpoint, so nothing was resumed; more steps= or kills="
    return kills


def _go_on(proof: Proof, kills: int) -> Command:
    """The command that a user would type now."""
    run_dir = proof.run_of("killed")
    if newest(run_dir):
        return Command(["resume", str(run_dir)], proof.logs, f"resumed-{kills}")
    if run_dir.exists():
        clear(run_dir)
    return proof.start("killed", proof.setting.train)


def _compared(reference: Path, killed: Path, steps: int) -> Iterator[Comparison]:
    from train.checkpoint.layout import step_folder
    from train.observe.metrics import read_metrics
    from train.prove.tensors import equal_checkpoints
    from train.run_folder import RunFolder

    ours, theirs = RunFolder(reference), RunFolder(killed)
    expected, found = read_metrics(ours.metrics), read_metrics(theirs.metrics)
    yield steps_in_order(found, steps)
    yield from equal_figures(expected, found)
    last, other = (step_folder(run.checkpoints, steps) for run in (ours, theirs))
    yield from equal_checkpoints(last, other, rng=True)


def _tell_whether_repeatable(proof: Proof, part: Part, reference: Path) -> None:
    """Trains in peace once more: where that differs too, the device's kernels are to blame and not the resume."""
    proof.stages.note("they differ; is a run without a kill the same twice?")
    again = proof.train("reference-again", proof.setting.train)
    steps = proof.setting.train.max_steps
    odd = next((each for each in _compared(reference, again, steps) if not each.same), None)
    if odd is None:
        part.notes.append("two runs without a kill are equal bit by bit: the difference comes from kill and resume")
    else:
        part.notes.append(
            f"two runs without a kill differ as well ({odd.what}: {odd.first}): on this device the same run is not the "
            "same twice, so this proof says nothing about the resume; deterministic kernels would let it"
        )
