"""Read batches from a folder of array files, or of images in class folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evennorm.errors import InputError
from evennorm.tools.data.arrays import from_arrays, mapped_npy, open_npy, open_npz
from evennorm.tools.data.batch import Batch, Data, mapped, ranges
from evennorm.tools.images import all_pixels, check_size, class_folders, images_in, is_grey, labelled_images, pixels


def open_folder(folder: Path, framework: str) -> Data:
    """Open a folder of array files or images as data.

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
            # Batches of each file in proportion to its samples, so that a limit takes some of all.
            share = None if limit is None else max(1, round(limit * (part.samples or 0) / samples))
            yield from part.read(size, share)

    return Data(str(folder), samples, labelled.pop(), read)


def _images(folder: Path, framework: str) -> Data:
    classes = class_folders(folder)
    found = labelled_images(classes) if classes else [(path, 0) for path in images_in(folder)]
    if not found:
        raise InputError(f"{folder} holds neither .npz or .npy files nor images, in folders by class or without")
    grey = all(is_grey(path) for path, _ in found)
    first = found[0][0], pixels(found[0][0], grey)

    def read(size: int, limit: int | None) -> Iterator[Batch]:
        for start, stop in ranges(len(found), size, limit):
            images = list(all_pixels([path for path, _ in found[start:stop]], grey))
            for (path, _), image in zip(found[start:stop], images, strict=True):
                check_size(first, (path, image))
            x = np.stack(images).astype("float32")
            x = x.transpose(0, 3, 1, 2) / 255 if framework == "torch" else x
            y = np.array([label for _, label in found[start:stop]])
            yield Batch(mapped(np.ascontiguousarray, x), y if classes else None)

    return Data(str(folder), len(found), bool(classes), read)
