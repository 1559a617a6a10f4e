"""The torch_npu wheel, in a folder of its own.

Never in the main environment: where torch_npu is installed and CANN is not there, `import torch` itself fails.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from configs.errors import DeviceError

VERSION = "2.13.0"
"""Of torch_npu, and of the torch that it fits."""
LIBRARY = "torch_npu/lib/libtorch_npu.so"


def fetch(folder: Path, wheel: str | None) -> None:
    """Unpacks torch_npu, without what it depends on, into `folder`.

    Args:
        folder: made anew; others read it once it is complete, so give a temporary one.
        wheel: file, or folder with it; None: from the package index that pip is set up with.

    Raises:
        DeviceError: there is no such wheel, or pip cannot get it.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "1"]
    # --no-compile: half of the time is spent on bytecode that Python writes on first use anyway.
    command += ["install", "--quiet", "--no-deps", "--no-compile", "--upgrade", "--target", str(folder)]
    done = subprocess.run([*command, *source(wheel)], capture_output=True, text=True)
    if done.returncode == 0 and (folder / LIBRARY).is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    message = [line for line in done.stderr.splitlines() if line.strip()][-2:] or [f"no {LIBRARY} in it"]
    raise DeviceError(
        f"torch_npu=={VERSION}",
        "pip cannot install it: " + "; ".join(message),
        remedy=f"`pip download --no-deps torch_npu=={VERSION}` where there is a network (Linux, Python 3.10 to 3.12), "
        "then wheel=FILE",
    )


def source(wheel: str | None) -> list[str]:
    """Words of pip that say where the wheel is.

    Raises:
        DeviceError: there is no such file, or it is another version's.
    """
    if wheel is None:
        return [f"torch_npu=={VERSION}"]
    path = Path(wheel).expanduser().absolute()
    if path.is_dir():
        return ["--no-index", "--find-links", str(path), f"torch_npu=={VERSION}"]
    if not path.is_file() or not path.name.startswith(f"torch_npu-{VERSION}-"):
        found = "there is no such file" if not path.exists() else "not a wheel of this version"
        raise DeviceError(
            "wheel",
            f"'{path}': {found}",
            allowed=f"torch_npu-{VERSION}-*.whl, or a folder with it",
            remedy=f"pip download --no-deps torch_npu=={VERSION}",
        )
    return ["--no-index", str(path)]
