"""Cleaning and deduplication on datatrove's executors: the prepared data is what one process makes, to the byte."""

from __future__ import annotations

import gzip
import json
import os
import random
import stat
import sys
from pathlib import Path

import pytest

from configs.errors import ConfigError, DataError, RunFailedError
from configs.schema.clean import (
    CleanConfig,
    DedupConfig,
    DedupScope,
    ExecutorConfig,
    LocalConfig,
    Pii,
    RayConfig,
    SlurmConfig,
)
from configs.schema.dataset import SplitBy
from configs.schema.roots import PrepConfig
from data_prep.corpus.executors import Ray, Slurm
from data_prep.prepare import prepare
from tests.unit.prep_kit import files, model_folder, prep_config, write_jsonl

pytest.importorskip("datatrove")

TIDY = CleanConfig(control_characters=True, whitespace=True, min_chars=20, mask_pii=[Pii.email])


def corpus(folder: Path, rows: int = 240) -> Path:
    """A large file and two small ones: repeated, nearly repeated and broken rows, personal data."""
    rng = random.Random(0)
    written: list[object] = []
    for number in range(rows):
        answer = [f"w{rng.randrange(500)}" for _ in range(40)]
        written.append({"prompt": f"Question {number} of jane{number}@example.com?  ", "completion": " ".join(answer)})
        if number % 10 == 0:
            written.append(written[-1])
        if number % 4 == 0:
            answer[20] = "changed"
            written.append(
                {"prompt": f"Question {number} of jane{number}@example.com?", "completion": " ".join(answer)}
            )
    written[7] = b"{broken"
    written[11] = {"prompt": "short?", "completion": "yes"}
    write_jsonl(folder / "a.jsonl", written[:-20])
    write_jsonl(folder / "b.jsonl", written[-20:-5])
    write_jsonl(folder / "c.jsonl", written[-5:])
    return folder


def config(tmp_path: Path, executor: ExecutorConfig | None, **changes: object) -> PrepConfig:
    dataset = files(tmp_path / "data", validation_fraction=0.1, test_fraction=0.1, **changes.pop("dataset", {}))
    cfg = prep_config(tmp_path, dataset, **{"clean": TIDY, "dedup": DedupConfig(exact=True, near=True), **changes})
    if executor is not None:
        cfg.executor = executor
    return cfg


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    corpus(tmp_path / "data")
    return model_folder(tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "dedup"),
    [
        ({}, DedupConfig(exact=True, near=True)),
        ({"split_by": SplitBy.random}, DedupConfig(near=True, scope=DedupScope.across)),
        ({}, DedupConfig()),
    ],
)
def test_local_makes_what_one_process_makes(tmp_path, model, settings, dedup):
    local = LocalConfig(work_dir=str(tmp_path / "work"), tasks=3, workers=1)
    expected, made = (
        prepare(config(tmp_path, executor, dataset=dict(settings), dedup=dedup), model, out=tmp_path / f"out{n}")
        for n, executor in enumerate((None, local))
    )
    assert content(made.path) == content(expected.path)
    assert made.manifest["rejects"]["by_reason"]["malformed JSON"] == 1
    assert made.manifest["cleaned"]["email masked"] > 200
    if dedup.near:
        assert made.manifest["duplicates"]["removed"] > 0


@pytest.mark.slow
def test_tasks_that_are_done_are_not_done_again(tmp_path, model):
    executor = LocalConfig(work_dir=str(tmp_path / "work with space"), tasks=2, workers=2)
    first = prepare(config(tmp_path, executor), model, out=tmp_path / "one")
    (folder,) = (tmp_path / "work with space").iterdir()
    rows = sorted((folder / "rows").iterdir())
    assert {path.name[:5] for path in rows} == {"00000", "00001"}  # the large file is cut
    times = [path.stat().st_mtime_ns for path in rows]
    (folder / "logs" / "read" / "completions" / "00001").unlink()
    second = prepare(config(tmp_path, executor), model, out=tmp_path / "two")
    assert content(second.path) == content(first.path)
    again = [path.name[:5] for path, time in zip(rows, times, strict=True) if path.stat().st_mtime_ns != time]
    assert again and set(again) == {"00001"}
    # Other settings are another corpus.
    cfg = config(tmp_path, executor)
    cfg.clean = CleanConfig(whitespace=True)
    prepare(cfg, model, out=tmp_path / "three")
    assert len(list((tmp_path / "work with space").iterdir())) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_that_a_task_meets_is_told_as_in_one_process(tmp_path, model, capfd, workers):
    rng = random.Random(0)
    rows = [{"prompt": "What is it, please?", "completion": rng.randbytes(300).hex()} for _ in range(5000)]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), 1)
    (tmp_path / "data" / "d.jsonl.gz").write_bytes(whole[: len(whole) * 9 // 10])  # its first rows can be read
    told = []
    for executor in (None, LocalConfig(work_dir=str(tmp_path / "work"), tasks=2, workers=workers)):
        with pytest.raises(DataError, match="d.jsonl.gz") as caught:
            prepare(config(tmp_path, executor), model, out=tmp_path / "one")
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert "Traceback" not in capfd.readouterr().err  # it is in the task's log


FAKE_SBATCH = """#!{python}
import json, os, re, subprocess, sys
from pathlib import Path
home = Path({home!r})
script = Path(sys.argv[-1]).read_text()
number = 1 + len(list(home.glob("job-*.json")))
options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.M))
(home / f"job-{{number:02d}}.json").write_text(json.dumps([sys.argv[1:-1], options, script]))
(home / f"job-{{number:02d}}.sh").write_text(script)
first, last = options["array"].partition("%")[0].split("-")
for task in range(int(first), int(last) + 1):
    env = {{"PATH": "/usr/bin:/bin", "HOME": "/", "SLURM_ARRAY_TASK_ID": str(task), "RUN_OFFSET": "0"}}
    if (home / "broken").exists():
        continue
    subprocess.run(["bash", home / f"job-{{number:02d}}.sh"], env=env, capture_output=True, cwd="/")
print("Submitted batch job", number)
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster: sbatch runs the tasks at once, with an empty environment; squeue knows no job."""
    home = tmp_path / "cluster"
    home.mkdir()
    for name, text in {
        "sbatch": FAKE_SBATCH.format(python=sys.executable, home=str(home)),
        "squeue": "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n",
    }.items():
        (home / name).write_text(text)
        (home / name).chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("data_prep.corpus.executors._SHORTEST_WAIT", 0.01)
    return home


def test_slurm_submits_one_array_a_stage_and_goes_on_when_they_are_done(tmp_path, model, slurm):
    executor = SlurmConfig(
        work_dir=str(tmp_path / "work 'quoted'"),
        tasks=2,
        partition="cpu",
        time="00:10:00",
        mem_per_cpu_gb=3,
        workers=1,
        sbatch_args={"account": "legal team"},
    )
    made = prepare(config(tmp_path, executor), model, out=tmp_path / "slurm")
    expected = prepare(config(tmp_path, None), model, out=tmp_path / "here")
    assert content(made.path) == content(expected.path)

    jobs = [json.loads(path.read_text()) for path in sorted(slurm.glob("job-*.json"))]
    assert [options["job-name"] for _, options, _ in jobs] == [
        f"crosstune-{stage}" for stage in ("mark", "read", "gather", "meet", "decide")
    ]
    assert [a for arguments, _, _ in jobs for a in arguments if "dependency" in a] == [
        f"--dependency=afterok:{number}" for number in (1, 2, 3, 4)
    ]
    _, options, script = jobs[1]
    assert options["array"] == "0-1%1" and options["time"] == "00:10:00" and options["partition"] == "cpu"
    assert options["mem-per-cpu"] == "3G" and options["account"] == "'legal team'" and "qos" not in options
    assert sys.executable in script and os.getcwd() in script

    # Another model needs no job: all tasks are done.
    cfg = config(tmp_path, executor, max_length=512)
    prepare(cfg, model, out=tmp_path / "other")
    assert len(list(slurm.glob("job-*.json"))) == 5


def test_slurm_says_which_tasks_failed_and_where_the_logs_are(tmp_path, model, slurm):
    (slurm / "broken").touch()
    cfg = config(tmp_path, SlurmConfig(work_dir=str(tmp_path / "work"), tasks=2, partition="cpu"), dedup=DedupConfig())
    with pytest.raises(RunFailedError, match="stage mark: 1 of 1 tasks failed") as caught:
        prepare(cfg, model, out=tmp_path / "one")
    assert "logs/mark" in str(caught.value.remedy)
    (slurm / "broken").unlink()
    prepare(cfg, model, out=tmp_path / "one")


def test_what_an_executor_needs_is_asked_for(tmp_path, monkeypatch):
    work = str(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    corpus(tmp_path / "data")
    with pytest.raises(ConfigError, match="sbatch is not on this machine"):
        prepare(
            config(tmp_path, SlurmConfig(work_dir=work, partition="cpu", tasks=2)), model_folder(tmp_path / "model")
        )
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="ray is not installed"):
        Ray(RayConfig(work_dir=work))
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(ConfigError, match="datatrove is not installed") as caught:
        Slurm(SlurmConfig(work_dir=work, partition="cpu"))
    assert "crosstune[corpus]" in str(caught.value.remedy)


def test_the_small_case_does_not_pay_for_the_large_one(tmp_path):
    import subprocess

    code = "import sys, data_prep.prepare; print(sorted({'datatrove', 'ray', 'py3langid'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
