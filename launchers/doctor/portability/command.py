"""The command's own process: looks at the folder, builds the stand-in, starts the probe, shows what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from configs.compose import save_resolved
from configs.errors import ConfigError, ModelError, RunFailedError, StorageError
from configs.schema.device import AscendConfig
from configs.schema.doctor import PortabilityConfig, StandinConfig
from configs.schema.model import HUB_PREFIX
from launchers.doctor import tripwire
from launchers.doctor.portability.report import Report, render
from launchers.doctor.standin.build import build
from launchers.failure import ERROR_DIR, earliest_error

CODE_KEY = "auto_map"
"""In config.json: Python that comes with the model."""


def portability(cfg: PortabilityConfig) -> dict[str, Any]:
    """Runs one step of the model on the stand-in and says what an Ascend NPU lacks for it.

    Returns:
        The report as JSON; ``exit_code`` 0 where nothing was found that stops the model, else 2.

    Raises:
        ConfigError: the device has no stand-in, or there is no such chip.
        ModelError: the model does not open, or brings code that nobody has agreed to run.
        DeviceError: the machine cannot hold the model, or cannot have the stand-in.
        StorageError: `out` cannot be written.
        RunFailedError: the probe itself broke.
    """
    if not isinstance(cfg.device, AscendConfig):
        raise ConfigError("device", "only Ascend has a stand-in to try a model on", allowed="ascend")
    _say(f"portability of {cfg.model.path} on an Ascend NPU: the real torch_npu API on a pretended device")
    model_dir = _model_folder(cfg)
    _check_code(cfg, model_dir)
    _say("      stand-in: looking for it")
    knobs = StandinConfig(build=cfg.standin, cache_dir=cfg.cache_dir, devices=1, hbm_mib=_host_mib(), soc=cfg.soc)
    standin = build(knobs, lambda line: _say(f"      {line}"))
    with tempfile.TemporaryDirectory(prefix="crosstune-portability-") as folder:
        work = Path(folder)
        knobs.report = str(work / "operators")
        environment = standin.environment(knobs, os.environ)
        environment |= {tripwire.VARIABLE: str(work / "tripwire.jsonl"), ERROR_DIR: str(work / "faults")}
        found = _probe(cfg, model_dir, work, environment)
        report = Report(cfg, model_dir, found, tripwire.records(work / "tripwire.jsonl"), _without_kernel(work))
        result = report.as_dict()
    if cfg.out is not None:
        _write(Path(cfg.out).expanduser(), result)
    _say(render(result, cfg.out))
    return result


def _model_folder(cfg: PortabilityConfig) -> Path:
    """The model's folder; with `layers` only its config.json and code are needed."""
    path = cfg.model.path
    if not cfg.layers or cfg.model.gguf_package:
        from train.models.load import ensure_model

        return ensure_model(cfg.model, Path(cfg.cache_dir), on_note=lambda note: _say(f"      {note}"))
    if path.startswith(HUB_PREFIX):
        from huggingface_hub import snapshot_download

        wanted = ["*.json", *(["*.py"] if cfg.model.trust_remote_code else [])]
        try:
            return Path(
                snapshot_download(path.removeprefix(HUB_PREFIX), revision=cfg.model.revision, allow_patterns=wanted)
            )
        except (OSError, ValueError) as error:
            raise ModelError("model.path", f"cannot get '{path}': {error}", remedy="check name and network") from None
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelError("model.path", f"no '{folder / 'config.json'}'", remedy="a model's folder, or hf://org/name")
    return folder


def _check_code(cfg: PortabilityConfig, folder: Path) -> None:
    """Refuses a model that opens only with Python of its own, unless the user has said so."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(str(folder / "config.json"), f"not JSON: {error}") from None
    if cfg.model.trust_remote_code or CODE_KEY not in content:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if content.get("model_type") not in CONFIG_MAPPING_NAMES:
        files = sorted({str(name).partition(".")[0] + ".py" for name in content[CODE_KEY].values()})
        raise ModelError(
            "model.trust_remote_code",
            f"'{folder}' opens only with Python that comes with it: {', '.join(files)}",
            remedy="read that code; then model.trust_remote_code=true runs it",
        )


def _probe(cfg: PortabilityConfig, model_dir: Path, work: Path, environment: dict[str, str]) -> dict[str, Any]:
    request, result, log = work / "request.yaml", work / "result.json", work / "probe.log"
    save_resolved(cfg, request)
    command = [
        sys.executable,
        "-P",
        "-m",
        "launchers.doctor.portability.probe",
        str(request),
        str(model_dir),
        str(result),
    ]
    with log.open("wb") as errors:
        code = subprocess.run(command, env=environment, stderr=errors).returncode
    fault = earliest_error(work / "faults")
    if fault is not None:
        raise fault
    if not result.exists():
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["no message"]
        if "Unsupported soc version" in last[0]:
            raise ConfigError("soc", f"torch_npu knows no '{cfg.soc}'", allowed="Ascend910B3, Ascend910PremiumA, ...")
        killed = " (killed: out of memory?)" if code == -9 else ""
        raise RunFailedError("portability", f"the probe ended with {code}{killed}: {last[0][:300]}")
    content: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return content


def _without_kernel(work: Path) -> dict[str, int]:
    """Operators that torch_npu has no kernel for, with their calls, from what the stand-in reports."""
    found: dict[str, int] = {}
    for file in (work / "operators").glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        for name in content["cautions"]:
            found[name] = found.get(name, 0) + int(content["operators"].get(name, {}).get("count", 1))
    return found


def _host_mib() -> int:
    return int(psutil.virtual_memory().total) // 2**20


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError("out", f"'{path}' cannot be written: {error.strerror}") from None


def _say(line: str) -> None:
    print(line, flush=True)
