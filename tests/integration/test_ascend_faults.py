"""What a user sees when something is wrong with an Ascend: on a pretended one, through the real command.

Each fault is one screen, of the right kind and exit code, without a traceback. A rank that dies or is slow is in
`test_ascend_road`; a killed worker on the CPU in `test_cli_train`.
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.command import crosstune, write_uneven_records
from tests.tiny import save_tiny_model

LINES_OF_A_SCREEN = 24


@dataclass(frozen=True)
class Case:
    """A command that must fail, and what its message must say."""

    code: int
    told: str
    """A regular expression; a blank stands for any white space."""
    words: tuple[str, ...] = ()
    knobs: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    begun: bool = False
    """Whether the model was loaded: what can be seen before must stop before."""


CASES = {
    "memory, forward": Case(
        3,
        r"npu:0: out of memory in the forward pass of step 1: 2\.0 MiB more were asked for, this process holds "
        r"\d\.\d MiB of 2\.0 MiB; micro_batch_tokens=400, .*packing=auto, activation_checkpointing=false, "
        r"sharding=plain.* remedy: micro_batch_tokens=320 .*then activation_checkpointing=true .*sharding=zero3",
        ("check_packing=false",),
        knobs={"hbm_mib": 2},
        begun=True,
    ),
    "memory, model": Case(
        3,
        r"npu:0: out of memory while the model was moved there: 2\.0 MiB more .* remedy: .*free the device",
        knobs={"hbm_mib": 1},
        begun=True,
    ),
    "no bf16": Case(
        2,
        r"model\.precision: bf16 .* remedy: .*(fp32|auto)",
        words=("model.precision=bf16",),
        knobs={"soc": "Ascend910PremiumA"},
    ),
    "no devices": Case(2, r"device=ascend: no NPU .* remedy:", knobs={"devices": 0}),
    "too many processes": Case(2, r"nproc: 3 processes, but .*2 .* remedy:|nproc: 3 processes, but 2", ("nproc=3",)),
    "not there": Case(2, r"ASCEND_RT_VISIBLE_DEVICES: .*7", env={"ASCEND_RT_VISIBLE_DEVICES": "0,7"}),
    "unsupported operator": Case(
        2,
        r"device=ascend: npu:0 has no kernel for aten::mul\.Tensor, which model\S* \(Llama\w+\), needs in the "
        r"check of packed rows remedy: crosstune doctor portability model\.path=\S+ device=ascend",
        knobs={"unsupported": ["aten::mul.Tensor"]},
        begun=True,
    ),
    "misspelt": Case(2, r"HCCL_DETERMINISITIC: .*did you mean HCCL_DETERMINISTIC", env={"HCCL_DETERMINISITIC": "true"}),
    "CANN not sourced": Case(2, r"device=ascend: .*set_env\.sh", env={"ASCEND_HOME_PATH": "", "LD_LIBRARY_PATH": ""}),
}


@pytest.fixture(scope="module")
def screens(standin, tmp_path_factory):
    """All cases, two at a time: exit codes are checked as they end, messages by the tests."""
    tmp = tmp_path_factory.mktemp("faults")
    model = save_tiny_model(tmp / "model", tie_word_embeddings=False)
    data = write_uneven_records(tmp / "data.jsonl", count=12)
    paths = [f"model.path={model}", f"dataset.path={data}", f"cache_dir={tmp / 'cache'}"]
    sizes = ["max_length=320", "batch_tokens=400", "micro_batch_tokens=400", "max_steps=1", "tuning=full"]
    plain = [f"device.{op}_kernel=reference" for op in ("attention", "rms_norm", "rotary", "swiglu")]
    crosstune("prep", *paths, "max_length=320")

    def screen(name: str, case: Case) -> str:
        run = f"run_dir={tmp / name.replace(' ', '-').replace(',', '')}"
        precision = () if "model.precision=bf16" in case.words else ("model.precision=fp32",)
        words = ["train", *paths, *sizes, "device=ascend", *plain, *precision, run, *case.words]
        return crosstune(*words, code=case.code, **standin.environment(**case.knobs) | case.env)

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(screen, name, case) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_told_on_one_screen(screens: dict[str, Future[str]], name: str):
    shown, case = screens[name].result(), CASES[name]
    ours = [line for line in shown.splitlines() if not re.match(r"\[?[EW]\d{4} |\[W\d|\[ERROR\]", line)]
    assert len(ours) <= LINES_OF_A_SCREEN and "Traceback" not in shown, shown
    assert re.search(case.told.replace(" ", r"\s+"), " ".join(ours)), shown
    assert ("parameters train" in shown) == case.begun, shown


def test_without_bf16_auto_takes_fp32_and_says_so(standin):
    code = """if True:
        from configs.compose import build, compose
        from configs.schema.model import Precision
        from train.devices.base import Device
        from train.models.load import resolve_precision

        device = build(compose("train", ["model.path=.", "dataset.path=.", "device=ascend"]).device, Device)
        device.activate(0)
        resolve_precision(Precision.auto, device, on_note=print)
    """
    done = standin.run([sys.executable, "-c", code], soc="Ascend910PremiumA")
    assert "precision fp32: the fastest that ascend has here" in done.stdout, done.stdout
