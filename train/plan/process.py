"""What a run's process holds besides tensors: Python and libraries, and the files of weights that it maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from configs.schema.roots import TrainConfig
from configs.schema.sharding import ZeroConfig
from train.engine.optimizer import build_optimizer, is_torchs
from train.engine.zero import import_deepspeed
from train.export.tensors import DTYPES


def process_bytes(cfg: TrainConfig, dtype: torch.dtype) -> int:
    """Resident set of a process of the run before it loads the model: that of this one, with what the run imports.

    A small model takes a step first, so that the code of the kernels is in memory, as it will be.
    """
    weight = nn.Parameter(torch.ones(64, 64, dtype=dtype))
    optimizer = build_optimizer(cfg.optim, [("weight", weight)])
    if isinstance(cfg.sharding, ZeroConfig):
        import_deepspeed()
    heads = F.silu(F.linear(torch.ones(1, 32, 64, dtype=dtype), weight)).view(1, 4, 32, 16)
    out = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).view(32, 64)
    F.cross_entropy(out.float(), torch.zeros(32, dtype=torch.long)).backward()  # type: ignore[no-untyped-call]
    if is_torchs(cfg.optim):  # another one may talk to other ranks, which are not here
        optimizer.step()
    return int(psutil.Process().memory_info().rss)


class Files:
    """The safetensors files of a model, which loading maps into memory.

    A weight that a file holds under the model's own name and in the run's number format stays there, mapped. One that
    is cast, or joined from several (the experts of most families), is made anew; the pages it was read from stay in
    memory as long as another weight of its file is mapped.

    Args:
        folder: of the model; without weights nothing is known, and nothing counted.
        shapes: of the model's weights, by name.
        dtype: of the run's weights.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> None:
        self.bytes = self.mapped = 0
        for path in sorted(folder.glob("*.safetensors")):
            self.bytes += path.stat().st_size
            self.mapped += _mapped(path, shapes, dtype)

    @property
    def beside(self) -> int:
        """Bytes of pages that stay in memory although their weights lie elsewhere."""
        return self.bytes - self.mapped if self.mapped else 0


def _mapped(path: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> int:
    """Bytes of a file that become weights as they are."""
    found = 0
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            piece = file.get_slice(name)
            shape = torch.Size(piece.get_shape())
            if shapes.get(name) == shape and DTYPES.get(piece.get_dtype()) == dtype:
                found += shape.numel() * dtype.itemsize
    return found
