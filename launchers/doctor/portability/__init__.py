"""`crosstune doctor portability`: one training step of a model on a pretended device, and what it lacks there."""

from launchers.doctor.portability.command import portability

__all__ = ["portability"]
