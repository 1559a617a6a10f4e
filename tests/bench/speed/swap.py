"""Takes a technique out of a run that is ablated."""

from __future__ import annotations

from pkgutil import resolve_name


def swap(where: str, name: str, value: object) -> None:
    """Replaces ``name`` of a module or class, such as ``train.devices.cpu:CpuDevice``.

    Raises:
        AttributeError: it is not there: a patch that does nothing would be measured as a technique that brings nothing.
    """
    place = resolve_name(where)
    if not hasattr(place, name):
        raise AttributeError(f"nothing of {where} is called {name}")
    setattr(place, name, value)
