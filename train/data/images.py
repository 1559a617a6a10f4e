"""What a model is given of images beside token ids: pixel values, their grids, positions in three dimensions.

Pixel values are made by the model's image processor when a micro-batch is built, and are gone with it. Where any sample
of the data shows an image, every micro-batch runs the vision tower: one without images, or without samples, gets a
blank image of one token behind everything else, which nothing attends to and nothing is learned from. Ranks would
otherwise run different modules, and those of ZeRO-3 would wait for each other forever.

The processors' own Pillow versions are used whatever else is installed, so that the same data give the same pixels
everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.errors import DataError
from data_prep.images import FOLDER, decoded, file_of
from data_prep.records import RowFault
from data_prep.vision import Grid, Vision, vision_of
from train.data.prepared import PREPARE_AGAIN, ImageRef, PreparedData, Sample

ROTARY_3D = ("qwen3_5", "qwen3_5_moe")
"""Models that rotate by time, row and column (M-RoPE), whether or not their config says how."""


@dataclass(frozen=True)
class Pixels:
    """Images as a vision tower takes them; P patches of N images."""

    values_P: torch.Tensor
    """fp32, ``[p x ...]``: what a patch is depends on the family."""
    grid_N3: torch.Tensor
    """int64: frames, rows and columns of patches."""

    def to(self, device: torch.device) -> Pixels:
        """The same on a device."""
        return Pixels(self.values_P.to(device), self.grid_N3.to(device))


class ImageInputs:
    """Makes the image inputs of micro-batches.

    Args:
        store: folder of the images' files.
        vision: of the model.
        max_pixels: of the largest image; one above it was not prepared.
        processor: transformers' image processor.
        rotary_3d: the language model's positions have three dimensions (Qwen's M-RoPE).
    """

    def __init__(self, store: Path, vision: Vision, max_pixels: int, processor: Any, *, rotary_3d: bool) -> None:
        self._store, self._vision, self._max_pixels = store, vision, max_pixels
        self._processor = processor
        self.rotary_3d = rotary_3d

    @classmethod
    def of(cls, data: PreparedData, model_dir: Path, config: Any) -> ImageInputs | None:
        """Those of prepared data; None: it has no images.

        Args:
            data: what is trained on.
            model_dir: of the base model.
            config: its transformers config.

        Raises:
            DataError: the images were prepared for another processor than the model's.
        """
        if not data.has_images:
            return None
        facts, vision = data.manifest["images"], vision_of(model_dir)
        if vision is None or vision.sha256 != facts["processor_sha256"]:
            found = f"holds images for another processor than that of {model_dir}"
            raise DataError(str(data.path), found, remedy=PREPARE_AGAIN)
        processor = image_processor(vision.model_type, model_dir)
        pixels = int(facts["max_image_pixels"])
        return cls(data.path / FOLDER, vision, pixels, processor, rotary_3d=vision.model_type in ROTARY_3D)

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Tokens that an image of this grid of patches becomes."""
        return self._vision.tokens(grid)

    @property
    def image_token(self) -> int:
        """Id of the token that stands for a piece of an image."""
        return self._vision.image_token

    @property
    def blank(self) -> Sample:
        """The token of the blank image, as a sample that nothing is learned from."""
        return Sample("", np.array([self.image_token], np.int32), np.zeros((0, 2), np.int32))

    def pixels(self, images: Sequence[ImageRef]) -> Pixels:
        """The images' pixels, one image decoded at a time; those of the blank image where there are none.

        Raises:
            DataError: an image is gone from the prepared folder, or is not what it was.
        """
        made = [self._processed(image) for image in images] or [self._blank_pixels()]
        values = torch.cat([pixels.values_P for pixels in made])
        return Pixels(values, torch.cat([pixels.grid_N3 for pixels in made]))

    def positions_3T(self, sample: Sample) -> np.ndarray:
        """Time, row and column of each token: a text token moves all three, an image lies in the latter two.

        From 0 for every sample. As `get_rope_index` of transformers' Qwen3.5.
        """
        merge = self._vision.merge_size
        positions = np.empty((3, len(sample.input_ids)), np.int64)
        starts = iter(_starts(sample, self._vision))
        at = position = 0
        for image in sample.images:
            first, (_, rows, columns) = next(starts), image.grid
            rows, columns = rows // merge, columns // merge
            positions[:, at:first] = np.arange(position, position + first - at)
            position += first - at
            at = first + rows * columns
            row, column = np.divmod(np.arange(rows * columns), columns)
            positions[:, first:at] = position + np.stack([np.zeros_like(row), row, column])
            position += max(rows, columns)
        positions[:, at:] = np.arange(position, position + len(sample.input_ids) - at)
        return positions

    def _processed(self, image: ImageRef) -> Pixels:
        path = file_of(self._store, image.sha256)
        try:
            data = path.read_bytes()
            opened = decoded(data, self._max_pixels, path.name)
        except (OSError, RowFault) as error:
            raise DataError(str(path), f"an image of the data: {error}", remedy=PREPARE_AGAIN) from None
        if hashlib.sha256(data).hexdigest() != image.sha256:
            raise DataError(str(path), "an image of the data is another one than was prepared", remedy=PREPARE_AGAIN)
        made = self._processor(images=[opened], return_tensors="pt")
        pixels = Pixels(made["pixel_values"].float(), made["image_grid_thw"].long())
        if tuple(pixels.grid_N3[0].tolist()) != image.grid:
            found = f"has {pixels.grid_N3[0].tolist()} patches and was prepared as {list(image.grid)}"
            raise DataError(str(path), found, remedy=PREPARE_AGAIN)
        return pixels

    def _blank_pixels(self) -> Pixels:
        """One token's patches, all zero: the mean of pictures."""
        merge, size = self._vision.merge_size, self._vision.patch_size
        frames = int(self._vision.settings.get("temporal_patch_size", 0))
        patch = (3 * frames * size * size,) if frames else (3, size, size)
        return Pixels(torch.zeros(merge * merge, *patch), torch.tensor([[1, merge, merge]]))


def _starts(sample: Sample, vision: Vision) -> Iterable[int]:
    """Where the tokens of each image begin."""
    places = np.flatnonzero(sample.input_ids == vision.image_token)
    counts = [vision.tokens(image.grid) for image in sample.images]
    assert len(places) == sum(counts), "a sample's image tokens are those of its images"
    return [int(places[n]) for n in np.cumsum([0, *counts[:-1]])] if counts else []


def image_processor(model_type: str, model_dir: Path) -> Any:
    """The model's image processor, without torchvision."""
    if model_type == "kimi_k25":
        return _kimi_processor().from_pretrained(str(model_dir), local_files_only=True)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(str(model_dir), local_files_only=True)


def _kimi_processor() -> Any:
    """Kimi's processor on transformers' Pillow parts; its own needs torchvision, which scales a little otherwise."""
    from transformers.image_processing_backends import PilBackend
    from transformers.image_processing_utils import BatchFeature
    from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling, SizeDict

    from data_prep.vision import shrunk

    class KimiImageProcessor(PilBackend):  # type: ignore[misc]
        do_resize = do_rescale = do_normalize = do_convert_rgb = True
        resample = PILImageResampling.BICUBIC
        image_mean, image_std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
        size = {"max_height": 512, "max_width": 512}
        patch_size, merge_size, max_patches = 14, 2, 16384
        model_input_names = ["pixel_values", "image_grid_thw"]

        def __init__(self, **settings: Any) -> None:
            for own in ("patch_size", "merge_size", "max_patches"):
                setattr(self, own, settings.pop(own, getattr(self, own)))
            super().__init__(**settings)

        def _preprocess(self, images: list[np.ndarray], **settings: Any) -> Any:
            [image] = images
            limits = settings["size"]
            scaled, padded = shrunk(
                *image.shape[-2:],
                factor=self.patch_size * self.merge_size,
                patch_size=self.patch_size,
                max_patches=self.max_patches,
                max_side=limits.max_height,
            )
            image = self.resize(image, SizeDict(height=scaled[0], width=scaled[1]), settings["resample"])
            [image] = self.pad([image], SizeDict(height=padded[0], width=padded[1]))
            image = self.rescale(image, settings["rescale_factor"])
            image = self.normalize(image, settings["image_mean"], settings["image_std"])
            grid: Grid = (1, padded[0] // self.patch_size, padded[1] // self.patch_size)
            cut = image.reshape(3, grid[1], self.patch_size, grid[2], self.patch_size).transpose(1, 3, 0, 2, 4)
            patches = np.ascontiguousarray(cut, np.float32).reshape(-1, 3, self.patch_size, self.patch_size)
            data = {"pixel_values": patches, "image_grid_thw": np.array([grid])}
            return BatchFeature(data=data, tensor_type=settings["return_tensors"])

    return KimiImageProcessor
