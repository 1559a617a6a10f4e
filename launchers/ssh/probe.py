"""The crosstune that a Python has: a program that the agent hands to the job's own Python on standard input.

That Python may have no crosstune, or another one, so this takes the standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys

PACKAGES = ("configs", "data_prep", "launchers", "train")
SOURCES = (".py", ".yaml", ".jinja")


def installed() -> dict[str, object]:
    """The crosstune of this Python: its version, and `sources`."""
    try:
        version = importlib.metadata.version("crosstune")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return {"version": version, "sources": sources(), "python": sys.version.split()[0]}


def sources() -> str:
    """Short hash over crosstune's own files, which tells two checkouts of one release apart.

    Empty where a package is missing. `crosstune doctor nodes` compares it, too.
    """
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        roots = list(spec.submodule_search_locations or []) if spec else []
        if len(roots) != 1:  # several folders of one name, none with an __init__.py, are somebody else's
            return ""
        for folder, folders, files in os.walk(roots[0]):
            folders.sort()
            for name in sorted(name for name in files if name.endswith(SOURCES)):
                path = os.path.join(folder, name)
                digest.update(f"{package}/{os.path.relpath(path, roots[0])}\0".encode())
                with open(path, "rb") as file:
                    digest.update(hashlib.sha256(file.read()).digest())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if path]  # as with -P: a folder `train` of the user's is not ours
    # A frame as the agent's own; a setup script may have left its last line without an end.
    sys.stdout.write("\n\x1e" + json.dumps(installed()) + "\n")
