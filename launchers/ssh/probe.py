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


def installed() -> dict[str, object]:
    """The crosstune of this Python: its version, and a hash over its source files, which tells two checkouts apart."""
    digest, found = hashlib.sha256(), []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        found += list(spec.submodule_search_locations or []) if spec else []
        for root in spec.submodule_search_locations or [] if spec else []:
            for folder, folders, files in os.walk(root):
                folders.sort()
                for name in sorted(name for name in files if name.endswith((".py", ".yaml"))):
                    path = os.path.join(folder, name)
                    digest.update(f"{package}/{os.path.relpath(path, root)}\0".encode())
                    with open(path, "rb") as file:
                        digest.update(hashlib.sha256(file.read()).digest())
    try:
        version = importlib.metadata.version("crosstune")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    whole = len(found) == len(PACKAGES)
    return {"version": version, "sources": digest.hexdigest()[:12] if whole else "", "python": sys.version.split()[0]}


if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if path]  # as with -P: a folder `train` of the user's is not ours
    # A frame as the agent's own; a setup script may have left its last line without an end.
    sys.stdout.write("\n\x1e" + json.dumps(installed()) + "\n")
