"""Read labelled samples from a file or folder; errors name the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evennorm.errors import InputError
from evennorm.tools.data import arrays
from evennorm.tools.images import all_pixels, check_size, class_folders, is_grey, labelled_images

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class Labelled:
    """Samples with labels as they were read, with a test set where the source has one."""

    source: str
    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None

    def checked(self, task: str = "classification") -> Labelled:
        """Return the same as float32 samples, images with a channel axis, and labels 0, 1, ... in the order of the given
        ones.

        Bytes are divided by 255; everything else is taken as it is. Of other tasks, targets are float32 (N, outputs).

        Raises:
            InputError: samples or labels that do not fit each other or cannot be trained on.
        """
        if task != "classification":
            return self._with_targets(task)
        x, y = self._samples("training", self.x), self._labels("training", self.y, self.x)
        known = np.unique(y)
        if len(known) < 2:
            raise InputError(f"{self.source}: training needs two classes or more; every training label is {known[0]}")
        y = np.searchsorted(known, y)
        if self.x_test is None or self.y_test is None:
            return Labelled(self.source, x, y)
        x_test, y_test = self._samples("test", self.x_test), self._labels("test", self.y_test, self.x_test)
        if x.shape[1:] != x_test.shape[1:]:
            raise InputError(
                f"{self.source}: training and test samples must have one shape; "
                f"received {x.shape[1:]} and {x_test.shape[1:]}"
            )
        unknown = np.setdiff1d(y_test, known)
        if len(unknown):
            raise InputError(
                f"{self.source}: test label {unknown[0]} never occurs in training; remove it or train on it too"
            )
        return Labelled(self.source, x, y, x_test, np.searchsorted(known, y_test))

    def _with_targets(self, task: str) -> Labelled:
        x, y = self._samples("training", self.x), self._targets("training", self.y, self.x, task)
        if (y == y[0]).all():
            raise InputError(
                f"{self.source}: there is nothing to learn where every training target is the same, {y[0][0]:g}"
            )
        if self.x_test is None or self.y_test is None:
            return Labelled(self.source, x, y)
        x_test, y_test = self._samples("test", self.x_test), self._targets("test", self.y_test, self.x_test, task)
        if x.shape[1:] != x_test.shape[1:] or y.shape[1:] != y_test.shape[1:]:
            raise InputError(
                f"{self.source}: training and test samples must have one shape; received {x.shape[1:]} with targets "
                f"{y.shape[1:]} and {x_test.shape[1:]} with {y_test.shape[1:]}"
            )
        return Labelled(self.source, x, y, x_test, y_test)

    def _targets(self, part: str, y: np.ndarray, x: np.ndarray, task: str) -> np.ndarray:
        if y.dtype.kind not in "buif" or y.ndim not in (1, 2) or len(y) != len(x) or 0 in y.shape:
            raise InputError(
                f"{self.source}: one number, or one row of numbers, per sample is needed; received {len(x)} {part} samples "
                f"and targets of {y.dtype} and shape {y.shape}"
            )
        with np.errstate(over="ignore"):
            targets = y.reshape(len(y), -1).astype("float32")
        if not np.isfinite(targets).all():
            bad = int(np.flatnonzero(~np.isfinite(targets).all(axis=1))[0])
            raise InputError(f"{self.source}: targets must be finite; that of {part} sample {bad} is not; remove it")
        if task == "multilabel" and not np.isin(targets, (0, 1)).all():
            raise InputError(
                f"{self.source}: multilabel needs rows of 0 and 1; received {part} labels from {targets.min():g} "
                f"to {targets.max():g}; is it --task regression?"
            )
        return targets

    def _samples(self, part: str, x: np.ndarray) -> np.ndarray:
        if x.dtype.kind not in "buif":
            raise InputError(f"{self.source}: {part} samples must be numbers; received an array of {x.dtype}")
        if x.ndim not in (2, 3, 4) or 0 in x.shape:
            raise InputError(
                f"{self.source}: {part} samples are an array (samples, features), (samples, height, width) or (samples, "
                f"height, width, channels), none of them 0; received {x.shape}"
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            scaled = x.astype("float32") / 255 if x.dtype == np.uint8 else x.astype("float32")
        if not np.isfinite(scaled).all():
            bad = int(np.flatnonzero(~np.isfinite(scaled).reshape(len(scaled), -1).all(axis=1))[0])
            raise InputError(f"{self.source}: samples must be finite; {part} sample {bad} holds NaN or infinity; remove it")
        return scaled[..., None] if scaled.ndim == 3 else scaled

    def _labels(self, part: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        if len(y.shape) not in (1, 2) or len(y) != len(x):
            raise InputError(
                f"{self.source}: one label per sample is needed; "
                f"received {len(x)} {part} samples and labels of shape {y.shape}"
            )
        if y.ndim == 2 and y.shape[1] > 1:
            if y.dtype.kind not in "buif" or not (np.isin(y, (0, 1)).all() and (y.sum(axis=1) == 1).all()):
                raise InputError(
                    f"{self.source}: {part} labels of shape {y.shape} must be one-hot, one 1 in each row and 0 elsewhere; "
                    "or give one whole number per sample"
                )
            return y.argmax(axis=1)
        y = y.reshape(len(y))
        if y.dtype.kind not in "bui" and not (y.dtype.kind == "f" and np.isfinite(y).all() and (y == np.round(y)).all()):
            raise InputError(f"{self.source}: labels are whole numbers or one-hot rows; received {part} labels of {y.dtype}")
        return y.astype("int64")


def read_npz(path: Path) -> Labelled:
    """Read the arrays x_train, y_train, x_test, y_test of an `.npz` file, or x and y alone; nothing in it is executed.

    Raises:
        InputError: a damaged file, a missing array, or one of Python objects.
    """
    held = arrays.npz_arrays(path, mapped=False).keys()
    for pair in (("x", "y"), NPZ_KEYS[:2]):
        if held >= set(pair) and not held & set(NPZ_KEYS[2:]):
            return Labelled(str(path), *arrays.read_npz(path, pair))
    return Labelled(str(path), *arrays.read_npz(path, NPZ_KEYS, "training and test apart, or x and y alone"))


def is_idx_folder(folder: Path) -> bool:
    """Return whether a folder holds one of MNIST's four IDX files, gzipped or not."""
    return any((folder / f"{name}{suffix}").is_file() for name in IDX_FILES for suffix in ("", ".gz"))


def read_idx_folder(folder: Path) -> Labelled:
    """Read the four IDX files of MNIST and Fashion-MNIST, gzipped or not (https://yann.lecun.com/exdb/mnist).

    Raises:
        InputError: one of the four is missing or damaged.
    """
    read = []
    for name in IDX_FILES:
        path = next((folder / f"{name}{suffix}" for suffix in (".gz", "") if (folder / f"{name}{suffix}").is_file()), None)
        if path is None:
            raise InputError(f"{folder} must hold the four files {', '.join(IDX_FILES)}, gzipped or not; {name} is missing")
        read.append(arrays.idx_array(path))
    return Labelled(str(folder), *read)


def read_class_folders(folder: Path) -> Labelled:
    """Read images in one folder per class, or in `train` and `test` folders with one folder per class each.

    Grey where every image is, else RGB.

    Raises:
        InputError: no class folders, an empty one, a damaged image, images of unequal sizes.
        MissingExtra: Pillow is not installed.
    """
    names = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if names != {"train", "test"}:
        paths = _image_paths(folder)
        return Labelled(str(folder), _read_images([path for path, _ in paths]), np.array([label for _, label in paths]))
    train, test = (_image_paths(folder / part) for part in ("train", "test"))
    classes = [sorted({path.parent.name for path, _ in part}) for part in (train, test)]
    if classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1]))
        raise InputError(f"{folder}: train and test must hold the same class folders; only one of them has {', '.join(odd)}")
    x = _read_images([path for path, _ in train + test])
    y = np.array([label for _, label in train + test])
    return Labelled(str(folder), x[: len(train)], y[: len(train)], x[len(train) :], y[len(train) :])


def _image_paths(folder: Path) -> list[tuple[Path, int]]:
    """Return every image with the number of its class folder, in the order of names."""
    classes = class_folders(folder)
    if not classes:
        raise InputError(
            f"{folder} must hold one folder of images per class, or the four IDX files of MNIST; it has no folders"
        )
    return labelled_images(classes)


def _read_images(paths: list[Path]) -> np.ndarray:
    grey = all(map(is_grey, paths))
    opened: list[np.ndarray] = []
    for path, image in zip(paths, all_pixels(paths, grey), strict=True):
        opened.append(image)
        check_size((paths[0], opened[0]), (path, opened[-1]))
    return np.stack(opened)[..., 0] if grey else np.stack(opened)
