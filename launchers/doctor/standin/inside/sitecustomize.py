"""Runs at the start of every Python process on the stand-in: has the overlay put on as soon as torch_npu is imported.

Nothing is imported here that the process would not import by itself, so one without torch starts as fast as ever.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType


class _ThenPutOn(importlib.abc.Loader):
    """The loader of torch_npu, and the overlay after it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        from launchers.doctor.standin.inside.standin_process import put_on

        put_on()


class _Watch(importlib.abc.MetaPathFinder):
    """Finds torch_npu as Python itself would: also for those who only ask where it is."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch_npu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenPutOn(spec.loader)
        return spec


def _run_the_next_one() -> None:
    """This file hides a sitecustomize further down the path, such as a distribution's own."""
    here = os.path.dirname(os.path.abspath(__file__))
    rest = [folder for folder in sys.path if os.path.abspath(folder) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _Watch())
_run_the_next_one()
