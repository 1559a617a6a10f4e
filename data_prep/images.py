"""Images of records: found, looked at, and kept in the prepared folder as the bytes they came as.

An image is read and decoded once while data is prepared, so that whatever is wrong with it becomes a reject of its
row. Kept are its own bytes, in a file named by their hash: an image of several records is there once, and the same
inputs give the same files. Pixel values are made in training, one micro-batch at a time.

Nothing is fetched: a reference is a path, or holds the image itself (``data:``).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from data_prep.manifest import NAME
from data_prep.records import Origin, RowFault
from data_prep.rendered import ImageUse
from data_prep.vision import Vision

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = "images"
"""Of the prepared folder."""
UNREADABLE = "an image cannot be read"
"""Begins the reason of every reject that another look at the image's file may undo."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Others of Pillow's are rare, and some start programs."""
_MAX_BYTES = 256 * 2**20
"""Of an image's file: it is held in memory whole."""


@dataclass(frozen=True, slots=True)
class Looked:
    """An image of a record that is sound."""

    use: ImageUse
    reference: str
    """As the record gave it."""


class Images:
    """Looks at images and keeps them.

    Args:
        vision: of the model.
        base: folder where relative paths begin; None: that of the file of the record.
        max_pixels: of the largest image.
        store: folder to keep images in; None: they are only looked at.
    """

    def __init__(self, vision: Vision, *, base: Path | None, max_pixels: int, store: Path | None) -> None:
        self.vision = vision
        self._base, self._max_pixels, self._store = base, max_pixels, store

    def look(self, reference: str, origin: Origin) -> Looked:
        """Reads and decodes an image.

        Raises:
            RowFault: it is not there, is none, is damaged or too large.
        """
        data, source = self._read(reference, origin)
        image = decoded(data, self._max_pixels, source or short(reference))
        grid = self.vision.grid(image.height, image.width)
        return Looked(ImageUse(hashlib.sha256(data).hexdigest(), grid, source), reference)

    def keep(self, images: Iterable[Looked], origin: Origin) -> None:
        """Puts images into the store; read again, so that only one at a time is in memory.

        Raises:
            RowFault: one has changed since it was looked at.
        """
        if self._store is None:
            return
        for image in images:
            path = file_of(self._store, image.use.sha256)
            if path.exists():
                continue
            data, _ = self._read(image.reference, origin)
            if hashlib.sha256(data).hexdigest() != image.use.sha256:
                raise RowFault(f"{UNREADABLE}: it changes meanwhile", short(image.reference))
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}")  # several workers may meet the same image
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)

    def _read(self, reference: str, origin: Origin) -> tuple[bytes, str]:
        """An image's bytes, and the path of its file; empty for one that the record holds itself."""
        if reference.startswith("data:"):
            return _inline(reference), ""
        try:
            url = urlsplit(reference)
        except ValueError as error:
            raise RowFault(f"{UNREADABLE}: {error}", short(reference)) from None
        if url.scheme in ("http", "https", "ftp", "s3", "gs", "hdfs"):
            raise RowFault("an image is not on this machine", f"{short(reference)}; fetch it and give its path")
        named = Path(unquote(url.path) if url.scheme == "file" else reference)
        path = named
        try:
            base = self._base or Path(origin.file).expanduser().parent
            path = (base / named.expanduser()).absolute()
            if not stat.S_ISREG(path.stat().st_mode):
                raise RowFault(f"{UNREADABLE}: not a file", str(path))
            if path.stat().st_size > _MAX_BYTES:
                raise RowFault("an image's file is above 256 MiB", str(path))
            return path.read_bytes(), str(path)
        except FileNotFoundError:
            raise RowFault(f"{UNREADABLE}: no such file", str(path)) from None
        except (OSError, ValueError, RuntimeError) as error:
            found = getattr(error, "strerror", None) or str(error)
            raise RowFault(f"{UNREADABLE}: {found}", short(str(path))) from None


def decoded(data: bytes, max_pixels: int, name: str) -> Image:
    """The image, upright, in RGB: as transformers opens one.

    Args:
        data: of its file.
        max_pixels: it may have; known from the head of the file, before anything of that size is made.
        name: for people.

    Raises:
        RowFault: it is no image, damaged, animated or too large.
    """
    import PIL.Image
    from PIL import ImageOps, UnidentifiedImageError

    PIL.Image.MAX_IMAGE_PIXELS = None  # our own limit is told in our own words, before anything of that size is made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image: Any = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > max_pixels:
                raise RowFault(
                    "an image has more pixels than max_image_pixels", f"{name}: {image.width} x {image.height}"
                )
            if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a phone's second view
                raise RowFault("an image has several frames", f"{name}: {image.n_frames}")
            return ImageOps.exif_transpose(image).convert("RGB")
        except UnidentifiedImageError:
            found = f"{name}; known: {', '.join(_FORMATS)}"
            raise RowFault(f"{UNREADABLE}: not an image", found) from None
        except (MemoryError, RowFault):
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise RowFault(f"{UNREADABLE}: damaged", f"{name}: {str(error)[:80]}") from None


def file_of(store: Path, sha256: str) -> Path:
    """Where an image is kept."""
    return store / sha256[:2] / sha256


def tidy(store: Path) -> None:
    """Removes what a killed worker had begun to write."""
    for partial in store.glob("??/.*"):
        partial.unlink()


def stored(store: Path) -> dict[str, Any]:
    """How many images a folder keeps, their bytes, and a hash of their hashes."""
    files = sorted(path for path in store.glob("??/*") if not path.name.startswith("."))
    digest = hashlib.sha256("".join(path.name for path in files).encode()).hexdigest()
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files), "sha256": digest}


def changed_images(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Why prepared data may not be what its images' files now give; None: it is.

    Files that were not written to since then are not read again, and those that are gone were kept.

    Args:
        folder: of prepared data.
        manifest: its own.
    """
    since = (folder / NAME).stat().st_mtime_ns
    if any(reason.startswith(UNREADABLE) for reason in manifest["rejects"]["by_reason"]):
        for detail in _unreadable(folder / "rejects.jsonl"):
            path = Path(detail.partition(": ")[0].partition(";")[0])
            if _written_since(path, since):
                return f"{path}, which could not be read, has changed"
    if "images" not in manifest:
        return None
    for entry in manifest["splits"].values():
        for shard in entry["shards"]:
            for source, sha256 in _uses(folder / shard["file"]):
                try:
                    if _written_since(Path(source), since) and _sha256_of(source) != sha256:
                        return f"{source} has changed"
                except OSError as error:
                    return f"{source} cannot be read: {error.strerror}"
    return None


def _unreadable(rejects: Path) -> Iterator[str]:
    """What was said of each image that could not be read; begins with its path."""
    with rejects.open(encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            if entry["reason"].startswith(UNREADABLE):
                yield entry.get("detail", "")


def _written_since(path: Path, since: int) -> bool:
    return path.is_file() and max(path.stat().st_mtime_ns, path.stat().st_ctime_ns) > since


def _sha256_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _uses(shard: Path) -> Iterator[tuple[str, str]]:
    """Path and hash of every image of a shard's samples that was a file."""
    import pyarrow as pa

    with pa.memory_map(str(shard)) as source:
        reader = pa.ipc.open_file(source)
        if "images" not in reader.schema.names:
            return
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            columns = (batch[name].flatten().to_pylist() for name in ("image_sources", "images"))
            yield from ((path, sha256) for path, sha256 in zip(*columns, strict=True) if path)


def short(reference: str) -> str:
    """A reference for people: one that holds the image would be megabytes long."""
    return reference if len(reference) <= 100 else f"{reference[:60]}... ({len(reference)} characters)"


def _inline(reference: str) -> bytes:
    head, comma, body = reference.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("it is not base64")
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowFault(f"{UNREADABLE}: damaged", f"{short(head)}: {error}") from None
