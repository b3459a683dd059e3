"""A folder goes in; the batches of its array files, or of the images in its class folders, come out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from evennorm.errors import InputError, MissingExtra
from evennorm.tools.data.arrays import from_arrays, mapped_npy, open_npy, open_npz
from evennorm.tools.data.batch import Batch, Data, mapped, ranges


def open_folder(folder: Path, framework: str) -> Data:
    """
    Raises:
        InputError: it holds neither array files nor images, or they do not fit each other.
        MissingExtra: there are images, and Pillow is not installed.
    """
    files = sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    by_name = {file.name: file for file in files}
    if "x.npy" in by_name:
        return from_arrays(str(folder), {file.stem: mapped_npy(file) for file in files if file.suffix == ".npy"})
    packed = [file for file in files if file.suffix == ".npz"]
    if packed:
        return _joined(folder, [open_npz(file) for file in packed])
    plain = [file for file in files if file.suffix == ".npy"]
    if plain:
        return _joined(folder, [open_npy(file) for file in plain])
    return _images(folder, framework)


def _joined(folder: Path, parts: list[Data]) -> Data:
    labelled = {part.labelled for part in parts}
    if len(labelled) > 1:
        missing = next(part.name for part in parts if not part.labelled)
        raise InputError(f"{folder}: {missing} has no labels y, and others have; add them, or leave them out everywhere")
    samples = sum(part.samples or 0 for part in parts)

    def read(size: int, limit: int | None) -> Iterator[Batch]:
        for part in parts:
            # As many batches of each file as it has samples, so that the limit takes of all.
            share = None if limit is None else max(1, round(limit * (part.samples or 0) / samples))
            yield from part.read(size, share)

    return Data(str(folder), samples, labelled.pop(), read)


def _images(folder: Path, framework: str) -> Data:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("reading images", "tools") from error
    suffixes = set(Image.registered_extensions())
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found: list[tuple[Path, int]] = []
    for label, place in enumerate(classes or [folder]):
        images = sorted(path for path in place.iterdir() if path.suffix.lower() in suffixes and path.is_file())
        if classes and not images:
            raise InputError(f"{place} holds no images; remove it, or put the images of its class there")
        found.extend((path, label) for path in images)
    if not found:
        raise InputError(f"{folder} holds neither .npz or .npy files nor images, in folders by class or without")
    first = _pixels(found[0][0], None)
    grey = all(_is_grey(path) for path, _ in found[:: max(1, len(found) // 64)])

    def read(size: int, limit: int | None) -> Iterator[Batch]:
        for start, stop in ranges(len(found), size, limit):
            images = [_pixels(path, grey) for path, _ in found[start:stop]]
            for (path, _), image in zip(found[start:stop], images, strict=True):
                if image.shape[:2] != first.shape[:2]:
                    sizes = [f"{other.shape[1]} x {other.shape[0]}" for other in (first, image)]
                    raise InputError(
                        f"images must have one size: {found[0][0]} is {sizes[0]} and {path} is {sizes[1]}; resize them"
                    )
            x = np.stack(images).astype("float32")
            x = x.transpose(0, 3, 1, 2) / 255 if framework == "torch" else x
            y = np.array([label for _, label in found[start:stop]])
            yield Batch(mapped(np.ascontiguousarray, x), y if classes else None)

    return Data(str(folder), len(found), bool(classes), read)


def _is_grey(path: Path) -> bool:
    return _opened(path, lambda image: image.mode in ("1", "L", "LA"))


def _pixels(path: Path, grey: bool | None) -> np.ndarray:
    """(height, width, channels), one channel if `grey`; as the image has it if that is None."""

    def pixels(image: Any) -> np.ndarray:
        single = image.mode in ("1", "L", "LA") if grey is None else grey
        values = np.asarray(image.convert("L" if single else "RGB"))
        return values[..., None] if single else values

    return _opened(path, pixels)


def _opened(path: Path, use: Any) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return use(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable image ({str(error).splitlines()[0]}); repair or remove it") from error
