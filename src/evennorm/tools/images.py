"""Find images in one folder per class, and read their pixels and labels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from evennorm.errors import InputError, MissingExtra, reason_of
from evennorm.tools.archives import check_growth

T = TypeVar("T")
_RUN_PROGRAMS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5"}
"""Formats that Pillow reads by running other programs, or by plugins that others register."""
_GREY = ("1", "L", "LA", "I;16")


def class_folders(folder: Path) -> list[Path]:
    """Return the folders in it, by name, without hidden ones."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def images_in(folder: Path) -> list[Path]:
    """Return the images in a folder.

    Raises:
        MissingExtra: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("reading images", "tools", "pillow") from error
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind not in _RUN_PROGRAMS}
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())


def labelled_images(classes: list[Path]) -> list[tuple[Path, int]]:
    """Return every image with the number of its class folder, in the order of names.

    Raises:
        InputError: a folder without images.
    """
    found: list[tuple[Path, int]] = []
    for label, place in enumerate(classes):
        images = images_in(place)
        if not images:
            raise InputError(f"{place} holds no images; remove it, or put the images of its class there")
        found.extend((path, label) for path in images)
    return found


def is_grey(path: Path) -> bool:
    """Return whether an image has no colours; its header alone is read."""
    return _opened(path, lambda image: image.mode in _GREY)


def pixels(path: Path, grey: bool) -> np.ndarray:
    """Return the pixels of an image: (height, width, 1) if `grey`, else (height, width, 3).

    Raises:
        InputError: a damaged image.
    """

    def read(image: Any) -> np.ndarray:
        if image.mode == "I;16":  # 16-bit grey keeps its upper byte; Pillow would clip it
            upper = (np.asarray(image, np.uint16) >> 8).astype(np.uint8)[..., None]
            return upper if grey else upper.repeat(3, axis=2)
        values = np.asarray(image.convert("L" if grey else "RGB"))
        return values[..., None] if grey else values

    return _opened(path, read)


def all_pixels(paths: Sequence[Path], grey: bool) -> Iterator[np.ndarray]:
    """Yield `pixels` of each image, for callers who keep them all.

    Raises:
        InputError: a damaged image, or images that together unpack to far more than their files.
    """
    announced = stored = 0
    for path in paths:
        image = pixels(path, grey)
        announced, stored = announced + image.nbytes, stored + path.stat().st_size
        check_growth(str(path.parent), f"its images as far as {path.name}", announced, stored)
        yield image


def check_size(first: tuple[Path, np.ndarray], other: tuple[Path, np.ndarray]) -> None:
    """Check that two images have one size.

    Raises:
        InputError: two images are not of one size.
    """
    sizes = [f"{image.shape[1]} x {image.shape[0]}" for _, image in (first, other)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"images must have one size: {first[0]} is {sizes[0]} and {other[0]} is {sizes[1]}; resize them to one of these"
        )


def _opened(path: Path, use: Callable[[Any], T]) -> T:
    from PIL import Image

    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the file's size is what is asked here
            with Image.open(path, formats=sorted(set(Image.OPEN) - _RUN_PROGRAMS)) as image:
                check_growth(str(path), "its header", math.prod(image.size) * len(image.getbands()), path.stat().st_size)
                return use(image)
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds
        raise InputError(f"{path} is not a readable image ({reason_of(error)}); repair or remove it") from error
