"""A run folder made by really training a tiny model for a few steps."""

from __future__ import annotations

from pathlib import Path

from configs.compose import compose
from tests.tiny import samples_of, save_tiny_model, write_prepared
from train.run import train
from train.run_folder import RunFolder

LENGTHS = (24, 31, 18, 40, 27, 22, 35, 29)


def tiny_run(folder: Path, *overrides: str, **model_changes: object) -> RunFolder:
    """A model, prepared data and a run of three steps, all below `folder`."""
    model_dir = save_tiny_model(folder / "model", **model_changes)
    data = write_prepared(
        folder / "data",
        {
            "train": samples_of(LENGTHS, vocab_size=290),
            "test": samples_of(LENGTHS[::-1], vocab_size=290, seed=1),
        },
    )
    run_dir = folder / "run"
    run_dir.mkdir()
    typed = [f"model.path={model_dir}", f"dataset.path={data}", "dataset.license=CC0-1.0", f"run_dir={run_dir}"]
    fixed = ["device=cpu", "model.precision=fp32", "max_steps=3", "batch_tokens=80", "micro_batch_tokens=1024"]
    cfg = compose("train", [*typed, *fixed, "optim.lr=0.01", *overrides])
    train(cfg, model_dir=model_dir, prepared=data, run_dir=run_dir)
    return RunFolder(run_dir)
