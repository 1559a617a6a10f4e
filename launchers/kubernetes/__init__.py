"""Jobs on Kubernetes: one file per kind of job object; `base` has what they share, `entry` is what a pod runs."""

from __future__ import annotations

from typing import Any

Manifest = dict[str, Any]
"""An object as the API server takes and gives it."""
