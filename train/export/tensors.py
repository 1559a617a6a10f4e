"""Safetensors, tensor by tensor: reading a model folder's and writing new ones without holding them.

The library's own writer wants every tensor of a file in memory; the format is a length, a JSON header and the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from configs.errors import ModelError
from train.export.digest import Digest

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Its values. The file is mapped for this tensor alone, so that its pages can go again."""
        with safe_open(self.file, "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(self.name)
        return tensor


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written; made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor | Iterator[torch.Tensor]]
    """Its values, whole or piece by piece in the order of their flat index."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def stored_tensors(model_dir: Path) -> dict[str, Stored]:
    """Every tensor of a model folder by name, file by file in the order of their data, from the headers alone.

    Raises:
        ModelError: no safetensors, a damaged file, or a number format that is not known here.
    """
    index = model_dir / INDEX
    whole = model_dir / "model.safetensors"
    # As transformers looks for them; a folder may hold other files beside the model's own.
    files = [whole] if whole.is_file() else sorted(model_dir.glob("*.safetensors"))
    if not whole.is_file() and index.is_file():
        try:
            files = sorted({model_dir / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError) as error:
            raise ModelError(str(index), f"cannot be read: {error}") from None
    if not files:
        raise ModelError(str(model_dir), "no *.safetensors", remedy="name a folder with the weights of a model")
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.offset_keys():
                    if name in found:
                        raise ModelError(
                            str(file), f"{name} is in {found[name].file.name} as well", remedy="keep one of the files"
                        )
                    piece = opened.get_slice(name)
                    found[name] = Stored(file, name, tuple(piece.get_shape()), DTYPES[piece.get_dtype()])
        except (OSError, SafetensorError) as error:
            raise ModelError(str(file), f"cannot be read: {error}") from None
        except KeyError as error:
            found_format = f"a tensor in the number format {error}"
            raise ModelError(
                str(file), found_format, allowed=", ".join(DTYPES), remedy="take the model's bf16 original"
            ) from None
    return found


def write_file(path: Path, tensors: Sequence[Planned]) -> str:
    """Writes one safetensors file; at most one tensor, or one piece of it, is in memory at a time.

    Returns:
        The SHA-256 of the file, taken while it is written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.num_bytes],
        }
        at += tensor.num_bytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    head = struct.pack("<Q", len(head)) + head
    with path.open("wb") as file, Digest() as digest:
        file.write(head)
        digest.update(head)
        for tensor in tensors:
            written = 0
            for piece in _pieces(tensor):
                assert piece.dtype == tensor.dtype, tensor.name
                # Through bytes: numpy knows no bf16.
                data = piece.contiguous().view(-1).view(torch.uint8).numpy().view(np.uint8).data
                digest.update(data)
                written += file.write(data)
                if len(data) == tensor.num_bytes:
                    digest.wait()  # it was made whole: it goes before the next one is made
                del piece, data
            assert written == tensor.num_bytes, tensor.name
        return digest.hexdigest()


def _pieces(tensor: Planned) -> Iterator[torch.Tensor]:
    made = tensor.make()
    if isinstance(made, torch.Tensor):
        assert made.shape == tensor.shape, tensor.name
        pieces = iter([made])
        del made
        yield from pieces
    else:
        yield from made


def write_model(folder: Path, tensors: Sequence[Planned], shard_bytes: int) -> dict[str, str]:
    """Writes a model's weights: one file, or several of at most `shard_bytes` and an index.

    Returns:
        Name of each file with weights -> its SHA-256.
    """
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": write_file(folder / "model.safetensors", shards[0])}
    weight_map: dict[str, str] = {}
    hashes: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        hashes[name] = write_file(folder / name, shard)
        weight_map.update({tensor.name: name for tensor in shard})
    write_index(folder / INDEX, sum(t.num_bytes for t in tensors), weight_map)
    return hashes


def write_index(path: Path, total_bytes: int, weight_map: Mapping[str, str]) -> None:
    """Writes the index that tells readers which file holds which tensor."""
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(content, indent=2) + "\n")
