"""The stand-in on disk: built once per versions and sources, found again in a moment.

    ROOT/torch_npu-2.13.0-cp311/   the wheel, unpacked and unchanged
    ROOT/<key>/                    the pretended CANN and the overlay, with standin.json

Both are made in a temporary folder beside, the second is loaded once, and they are moved into place whole: what stands
under its name is complete and works. A lock keeps two builds apart. Builds of older versions and sources stay (0.7 MB
each); whoever wants them gone deletes ROOT.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from configs.errors import DeviceError, RunFailedError, StorageError
from configs.schema.doctor import StandinConfig
from launchers.doctor.standin import compile, wheel

INSIDE = Path(__file__).parent / "inside"
MANIFEST = "standin.json"
MARK = "CROSSTUNE_STANDIN"
"""Set in every process on the stand-in, to ROOT: who reports about a device can say that it is a pretended one."""
TEMPORARY = ".crosstune-standin-"
PROOF = "import torch, torch_npu, standin_overlay; assert (torch.ones(2, device='npu') * 2).tolist() == [2, 2]"
"""What a new build must be able to run."""
ASCENDS_OWN = ("ASCEND_", "PYTORCH_NPU_", "NPU_", "ACL_", "TORCH_DEVICE_BACKEND_AUTOLOAD")
"""Beginnings of a user's settings that a proof of the build is not about."""


@dataclass(frozen=True)
class Standin:
    """A stand-in that is built."""

    folder: Path
    """CANN's libraries and the overlay."""
    site: Path
    """The wheel, unpacked."""
    versions: Mapping[str, str]
    build_seconds: float
    """What building took just now; 0 where it was there."""

    def environment(self, cfg: StandinConfig, base: Mapping[str, str]) -> dict[str, str]:
        """The whole environment of a process on the stand-in: `base`, with what makes it so.

        Sets nothing that a user's own settings are about (TASK_QUEUE_ENABLE, OMP_NUM_THREADS, ...).
        """
        cann = self.folder / "cann"
        # The same Python and the same crosstune, whatever else is installed.
        path = [str(Path(sys.executable).parent)]
        return {
            **base,
            MARK: str(self.folder.parent),
            "ASCEND_HOME_PATH": str(cann),
            "ASCEND_OPP_PATH": str(cann / "opp"),
            "LD_LIBRARY_PATH": _joined([str(cann / "lib64")], base.get("LD_LIBRARY_PATH")),
            "PYTHONPATH": _joined([str(INSIDE), str(self.folder), str(self.site)], base.get("PYTHONPATH")),
            "PATH": _joined(path, base.get("PATH", os.defpath)),
            **_knobs(cfg),
        }


def build(cfg: StandinConfig, say: Callable[[str], None] = lambda line: None) -> Standin:
    """The stand-in of these versions, built where it is not there yet (half a minute; 130 MB with the wheel).

    Args:
        cfg: `build`, `wheel` and `cache_dir` are looked at; the knobs are of the environment.
        say: takes a line before each step that lasts.

    Raises:
        DeviceError: this machine cannot have one: not Linux, another torch, no wheel.
        ErrorGroup: tools are missing.
        RunFailedError: the compiler failed, or what it made does not load.
        StorageError: the folder cannot be written, or not be searched.
    """
    _check_machine()
    compile.check_tools()
    if cfg.wheel:
        wheel.source(cfg.wheel)
    root = (Path(cfg.build) if cfg.build else Path(cfg.cache_dir) / "ascend-standin").expanduser().absolute()
    if os.pathsep in str(root):
        raise StorageError(
            str(root), f"'{os.pathsep}' separates the folders of a search path", remedy="build=DIR without it"
        )
    versions = _versions()
    folder = root / _key(versions)
    site = root / f"torch_npu-{wheel.VERSION}-{sys.implementation.cache_tag}"
    started = time.monotonic()
    if _complete(folder, site):
        return Standin(folder, site, versions, 0.0)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / ".lock", say):
            _build(root, folder, site, cfg.wheel, versions, say)
    except OSError as error:
        raise StorageError(str(root), f"cannot be written: {error.strerror}", remedy="build=DIR elsewhere") from error
    return Standin(folder, site, versions, time.monotonic() - started)


def _build(
    root: Path, folder: Path, site: Path, source: str | None, versions: Mapping[str, str], say: Callable[[str], None]
) -> None:
    for stale in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(stale)  # of a build that was killed: we hold the lock
    if not (site / wheel.LIBRARY).is_file():
        shutil.rmtree(site, ignore_errors=True)  # somebody's hand was in it
        say(f"fetching torch_npu {wheel.VERSION} (44 MB) into {root}")
        with _moved_into_place(site) as partial:
            wheel.fetch(partial, source)
    if not (folder / MANIFEST).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        say("compiling the pretended CANN and the overlay (half a minute)")
        with _moved_into_place(folder) as partial:
            compile.compile_all(partial, site / wheel.LIBRARY)
            if _hash_of_sources() != versions["sources"]:
                raise RunFailedError("ascend-standin", "its sources changed while they were compiled", remedy="again")
            prove(Standin(partial, site, versions, 0.0))
            (partial / MANIFEST).write_text(json.dumps(dict(versions), indent=1), encoding="utf-8")


def prove(standin: Standin) -> None:
    """Runs one operator on the stand-in, in a process of its own.

    Raises:
        RunFailedError: it cannot be loaded, such as one whose files were edited while it was compiled.
    """
    base = {name: value for name, value in os.environ.items() if not name.startswith(ASCENDS_OWN)}
    environment = standin.environment(StandinConfig(devices=1), base)
    done = subprocess.run([sys.executable, "-P", "-c", PROOF], env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RunFailedError("ascend-standin", f"was compiled, but does not load: {said[0][:300]}", remedy="again")


def _complete(folder: Path, site: Path) -> bool:
    return (folder / MANIFEST).is_file() and (site / wheel.LIBRARY).is_file()


@contextmanager
def _moved_into_place(final: Path) -> Iterator[Path]:
    """A temporary folder, which becomes `final` when the block ends well and is gone otherwise."""
    partial = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=final.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's is for the owner alone
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        say(f"another process builds in {path.parent}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_machine() -> None:
    if sys.platform != "linux":
        raise DeviceError(
            "ascend-standin", f"torch_npu is for Linux, this is {sys.platform}", remedy="a Linux container"
        )
    if not version("torch").startswith(wheel.VERSION):
        raise DeviceError(
            "torch", f"version {version('torch')}", allowed=wheel.VERSION, remedy=f"pip install torch=={wheel.VERSION}"
        )


def _versions() -> dict[str, str]:
    """All that decides about the built files."""
    return {
        "torch": version("torch"),
        "torch_npu": wheel.VERSION,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "compiler": f"g++ {compile.compiler_version()}",
        "sources": _hash_of_sources(),
    }


def _hash_of_sources() -> str:
    """Over what is compiled and how. Not `inside/`, which processes read where it stands."""
    digest = hashlib.sha256(compile.RECIPE)
    for file in sorted(compile.SOURCES.glob("cann/*")) + sorted(compile.SOURCES.glob("overlay/*")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _key(versions: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()[:12]
    return f"{versions['torch']}-{digest}"


def _knobs(cfg: StandinConfig) -> dict[str, str]:
    """Settings for the pretended device; an empty one is as none, and hides one of an outer stand-in."""
    names = [name if "::" in name else f"aten::{name}" for name in cfg.unsupported]
    return {
        f"{MARK}_DEVICES": str(cfg.devices),
        f"{MARK}_HBM_MIB": str(cfg.hbm_mib),
        f"{MARK}_SOC": cfg.soc,
        f"{MARK}_UNSUPPORTED": ",".join(names),
        f"{MARK}_DIE": cfg.die or "",
        f"{MARK}_SLOW": cfg.slow or "",
        f"{MARK}_REPORT": str(Path(cfg.report).expanduser().absolute()) if cfg.report else "",
    }


def _joined(first: list[str], rest: str | None) -> str:
    return os.pathsep.join([*first, *([rest] if rest else [])])


def summary(standin: Standin) -> dict[str, object]:
    """The stand-in as JSON."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(standin).items()}
