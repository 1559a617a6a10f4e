"""How the doctor's questions are carried: into the environment, container and place that a run would have there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from configs.compose import build, compose
from launchers.base import Launcher
from launchers.doctor.nodes.carry import COMMAND, IN_PLACE, ThroughSlurm, asker_of
from launchers.spec import MASTER, NODE


def asker(*words: str) -> object:
    """Who asks, with these words of `crosstune doctor nodes`."""
    cfg = compose("doctor_nodes", list(words))
    return asker_of(cfg, build(cfg.launcher, Launcher, cfg.cluster))


def srun(*words: str) -> tuple[list[str], list[str]]:
    """Options of the srun, and the command that takes its place on a node."""
    slurm = asker("launcher=slurm", "nodes=2", *words)
    assert isinstance(slurm, ThroughSlurm)
    argv = slurm.command(60)
    at = argv.index("bash")
    assert argv[at : at + 4] == ["bash", "-c", IN_PLACE, "crosstune"]
    return argv[:at], argv[at + 4 :]


def test_srun_is_asked_as_a_run_would_be(tmp_path: Path) -> None:
    options, command = srun("launcher.srun_extra=[--network=sn_all, '--comment=a b']", "queue_seconds=300")
    assert {"--network=sn_all", "--comment=a b", "--immediate=300"} <= set(options)
    assert command[-len(COMMAND) :] == list(COMMAND) and not any("container" in word for word in options)


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_a_container_of_slurm_is_looked_into(kind: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    words = [f"launcher.container={kind}", "launcher.image='/images/a b.sif'", "launcher.mounts=['/data:/data:ro']"]
    options, command = srun(*words, "launcher.container_args=[--nv]", f"run_dir={tmp_path}/runs/not-yet")
    mounts = f"{tmp_path}/runs:{tmp_path}/runs,{tmp_path}:{tmp_path},/data:/data:ro"
    inside = ["python3", *COMMAND]
    if kind == "pyxis":
        assert options[-4:-1] == ["--container-image=/images/a b.sif", f"--container-mounts={mounts}", "--nv"]
        assert command == inside
    else:
        assert command == ["apptainer", "exec", "--bind", mounts, "--nv", "/images/a b.sif", *inside]
        assert not any("container" in word for word in options)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n[01-04,07],login", "n01"), ("a,b", "a"), ("gpu-7", "gpu-7"), ("r[3,5]-ib", "r3-ib"), ("x-[2-9],y[1-2]", "x-2")],
)
def test_without_scontrol_the_first_machine_is_read_from_the_list(nodes: str, first: str, tmp_path: Path) -> None:
    """As inside a container, which has no commands of Slurm."""
    for word in ("sed", "bash", "env"):
        (tmp_path / word).symlink_to(f"/bin/{word}" if Path(f"/bin/{word}").exists() else f"/usr/bin/{word}")
    environment = {"PATH": str(tmp_path), "SLURM_JOB_NODELIST": nodes, "SLURM_PROCID": "1"}
    done = subprocess.run(["/bin/bash", "-c", IN_PLACE, "crosstune", "env"], env=environment, stdout=subprocess.PIPE)
    found = dict(line.partition("=")[::2] for line in os.fsdecode(done.stdout).splitlines())
    assert (found[NODE], found[MASTER]) == ("1", first)
