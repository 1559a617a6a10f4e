"""How a model that sees takes an image: what its folder says of that, and how many tokens an image becomes.

Pure: JSON files in, numbers out; no image and nothing of transformers is opened. The arithmetic is that of the
families' own processors, and tests hold it against them.

Not covered: videos, and families other than those of `_SEEING`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ModelError
from data_prep.records import RowFault

Grid = tuple[int, int, int]
"""Patches of an image: frames (1), rows, columns."""

_QWEN: dict[str, Any] = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
}
_KIMI: dict[str, Any] = {
    "patch_size": 14,
    "merge_size": 2,
    "max_patches": 16384,
    "size": {"max_height": 512, "max_width": 512},
}
_SEEING = {"qwen3_5": (_QWEN, 248056), "qwen3_5_moe": (_QWEN, 248056), "kimi_k25": (_KIMI, 163605)}
"""Model types whose images are prepared -> what their processors do, and the image token, where a folder says nothing
else: transformers leaves out of config.json what is its own default."""
_NO_MATTER = ("auto_map", "feature_extractor_type", "image_processor_type", "processor_class", "transformers_version")
"""Keys that change when a processor is saved again, but never its pixels."""
FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Vision:
    """A model's image processor, as far as it decides tokens."""

    model_type: str
    image_token: int
    """Id of the token that stands for a piece of an image."""
    settings: Mapping[str, Any]
    """Of the processor, with the family's own where the folder has none."""

    @property
    def sha256(self) -> str:
        """Hash of what decides pixels and tokens; the same after the processor was saved again."""
        kept = {key: value for key, value in self.settings.items() if key not in _NO_MATTER}
        whole = json.dumps([self.image_token, kept], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()

    @property
    def patch_size(self) -> int:
        """Pixels along a patch."""
        return int(self.settings["patch_size"])

    @property
    def merge_size(self) -> int:
        """Patches along what one token shows."""
        return int(self.settings["merge_size"])

    def grid(self, height: int, width: int) -> Grid:
        """The patches of an image.

        Args:
            height: pixels.
            width: pixels.

        Raises:
            RowFault: no processor takes an image of this shape.
        """
        size = self.settings["size"]
        if self.model_type == "kimi_k25":
            _, (height, width) = shrunk(
                height,
                width,
                factor=self.patch_size * self.merge_size,
                patch_size=self.patch_size,
                max_patches=int(self.settings["max_patches"]),
                max_side=int(size["max_height"]),
            )
        else:
            factor = self.patch_size * self.merge_size
            height, width = rounded(height, width, factor, int(size["shortest_edge"]), int(size["longest_edge"]))
        return 1, height // self.patch_size, width // self.patch_size

    def tokens(self, grid: Grid) -> int:
        """Tokens that an image of so many patches becomes."""
        return math.prod(grid) // self.merge_size**2


def rounded(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen's size of an image: multiples of `factor`, between the limits, about the same shape.

    As `smart_resize` of transformers' Qwen2-VL.

    Raises:
        RowFault: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise RowFault("an image is more than 200 times as long as wide", f"{width} x {height} pixels")
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        high = max(factor, math.floor(height / beta / factor) * factor)
        wide = max(factor, math.floor(width / beta / factor) * factor)
    elif high * wide < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        high = math.ceil(height * beta / factor) * factor
        wide = math.ceil(width * beta / factor) * factor
    return high, wide


def shrunk(
    height: int, width: int, *, factor: int, patch_size: int, max_patches: int, max_side: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Kimi's size of an image: never enlarged, then padded on the right and below to multiples of `factor`.

    As `navit_resize` of transformers' Kimi K2.5.

    Args:
        height: pixels.
        width: pixels.
        factor: pixels along what one token shows.
        patch_size: pixels along a patch.
        max_patches: of an image.
        max_side: patches along a side.

    Returns:
        The size that the image is scaled to, and that with its padding.
    """
    patches = max(1.0, height // patch_size) * max(1.0, width // patch_size)
    most = max_side * patch_size
    scale = min(1.0, math.sqrt(max_patches / patches), most / height, most / width)
    high, wide = (min(max(1, int(side * scale)), most) for side in (height, width))
    return (high, wide), (high + -high % factor, wide + -wide % factor)


def vision_of(model_dir: Path) -> Vision | None:
    """What a model folder says of images; None: it does not see, or not in a way that is known here.

    Raises:
        ModelError: a file of it is no JSON object.
    """
    config = _json(model_dir / "config.json")
    family = _SEEING.get(str(config.get("model_type")))
    settings = processor_settings(model_dir)
    if family is None or settings is None:
        return None
    own, token = family
    size = {**own["size"], **(settings.get("size") or {})}
    for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if settings.get(old) is not None:  # older folders of Qwen
            size[new] = settings[old]
    known = {key: value for key, value in settings.items() if value is not None}
    token = int(config.get("image_token_id", token))
    return Vision(str(config["model_type"]), token, {**own, **known, "size": size})


def why_blind(model_dir: Path) -> str:
    """Why `vision_of` found nothing, for people."""
    config = _json(model_dir / "config.json")
    kind = str(config.get("model_type"))
    if kind not in _SEEING:
        return f"images are prepared for {', '.join(_SEEING)}, not for '{kind}'"
    return f"{model_dir} has no {FILES[0]}"


def processor_settings(model_dir: Path) -> dict[str, Any] | None:
    """The image processor's settings as the folder has them; None: it has none."""
    own, whole = (_json(model_dir / name) for name in FILES)
    found = whole.get("image_processor")
    return own or (found if isinstance(found, dict) else None)


def _json(path: Path) -> dict[str, Any]:
    """A file's object; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(str(path), f"cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}
