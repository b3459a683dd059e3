"""Load a data set, check it and split it into three fixed parts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evennorm.errors import InputError, MissingExtra
from evennorm.tools.compare.files import Labelled, is_idx_folder, read_class_folders, read_idx_folder, read_npz
from evennorm.tools.compare.framework import FUNCTION
from evennorm.tools.compare.layout import UNCHANGED, moved, stored_format
from evennorm.tools.compare.tasks import task_of
from evennorm.tools.imported import misnamed

TEST_SHARE = 0.2
"""Share of the samples that is tested on where the source has no test set of its own."""

VALIDATION_SHARE = 0.2
"""Share of the training samples, at most, that is held out to choose learning rates by."""


@dataclass(frozen=True)
class Data:
    """Samples as float32, labels as 0 ... classes - 1, in a fixed random order.

    x_train (N, ...), y_train (N,): trained on; their first samples, as many as are tested on, measure training accuracy.
    x_validation, y_validation: held out of training; only learning rates are chosen by them.
    x_test, y_test: what every reported accuracy is measured on.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int
    """The number of outputs of a model: one per class, label or target."""

    task: str = "classification"
    chosen: bool = True
    """Whether the task was chosen from the labels."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, as the model takes it."""
        return self.x_train.shape[1:]

    @property
    def outputs_in_words(self) -> str:
        """The outputs in words: "10 classes", "3 labels" or "1 target"."""
        word = {"classification": "class", "multilabel": "label"}.get(self.task, "target")
        plural = "es" if word == "class" else "s"
        return f"{self.classes} {word}{plural if self.classes != 1 else ''}"

    @property
    def training_sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Training samples to measure training accuracy on, at most as many as there are test samples."""
        return self.x_train[: len(self.x_test)], self.y_train[: len(self.y_test)]

    @property
    def digest(self) -> str:
        """SHA-256 of every sample and label, in their order."""
        digest = hashlib.sha256()
        for part in (self.x_train, self.y_train, self.x_validation, self.y_validation, self.x_test, self.y_test):
            digest.update(repr((part.shape, part.dtype.str)).encode())
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def laid_out(self, stored: str, wanted: str) -> Data:
        """Return the same with the channels of images where they are wanted."""
        x_train, x_validation, x_test = (moved(x, stored, wanted) for x in (self.x_train, self.x_validation, self.x_test))
        return replace(self, x_train=x_train, x_validation=x_validation, x_test=x_test)

    def binarized(self) -> Data:
        """Return the same with every value 0 or 1, cut in the middle of the training samples' range."""
        middle = (float(self.x_train.min()) + float(self.x_train.max())) / 2
        cut = {name: (getattr(self, name) > middle).astype("float32") for name in ("x_train", "x_validation", "x_test")}
        return replace(self, **cut)

    def __str__(self) -> str:
        parts = f"{len(self.x_train)} training, {len(self.x_validation)} validation and {len(self.x_test)} test samples"
        said = f"{self.name}: {parts} of {' x '.join(map(str, self.input_shape))}, {self.outputs_in_words}"
        if self.task == "classification":
            return said
        return f"{said}; task {self.task}{', chosen from the labels' if self.chosen else ''}"


def load_data(source: str, task: str | None = None, wanted: str = "channels_last", data_format: str | None = None) -> Data:
    """Load the data set of that name, or at that path.

    Args:
        source: `digits`, `fashion-mnist`, a `.npz` file with x and y, or with x_train, y_train, x_test, y_test, a folder of
            IDX files, a folder with one folder of images per class (or `train` and `test` folders with those), or
            `module:function`, the user's own.
        task: one of `classification`, `multilabel` and `regression`; None chooses it from the labels.
        wanted: where the model has the channels of images, `channels_last` or `channels_first`; `unchanged` is where a
            `.npz` file has them.
        data_format: where a `.npz` file has them; None is what its sizes tell. What a function of the user's gives is not
            changed.

    Raises:
        InputError: nothing of that kind is there, or what is there cannot be trained on.
        MissingExtra: the digits are asked for, and scikit-learn, which holds them, is not installed.

    Example:
        >>> print(load_data("digits"))
        digits: 1151 training, 287 validation and 359 test samples of 8 x 8 x 1, 10 classes
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".npz":
        labelled = read_npz(path)
        stored = stored_format(labelled.x.shape, wanted, str(path), data_format)
        return _cut(path.resolve().name, labelled, task).laid_out(stored, wanted)
    if data_format is not None:
        raise InputError(f"--data-format is for the images of an .npz file; {source} says itself where its channels are")
    if FUNCTION.fullmatch(source):
        from evennorm.tools.compare.sources import from_function

        labelled, validation = from_function(source)
        stored = "channels_last" if labelled.x.ndim == 3 else UNCHANGED  # the channel axis of grey images is appended
        return _cut(source, labelled, task, validation).laid_out(stored, wanted)
    if source == "digits":
        labelled = _digits()
    elif source == "fashion-mnist":
        labelled = _fashion_mnist()
    elif path.is_dir():
        labelled = read_idx_folder(path) if is_idx_folder(path) else read_class_folders(path)
    else:
        hint = f"; {found}" if (found := misnamed(source)) else ""
        raise InputError(
            "data are digits, fashion-mnist, an .npz file, a folder of IDX files, a folder of class folders of images or "
            f"module:function; received {source!r}, which is none of these{hint}"
        )
    name = path.resolve().name if path.is_dir() else source
    return _cut(name, labelled, task).laid_out("channels_last", wanted)


def _digits() -> Labelled:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("the data set digits", "demo", "scikit-learn") from error
    digits = load_digits()
    return Labelled("digits", (digits.images / 16).astype("float32"), digits.target)


def _fashion_mnist() -> Labelled:
    from keras.datasets import fashion_mnist

    try:
        (x_train, y_train), (x_test, y_test) = fashion_mnist.load_data()
    except Exception as error:  # Keras raises a bare Exception where a download fails
        raise InputError(
            f"fashion-mnist could not be downloaded ({str(error).splitlines()[0]}); give the folder of its four IDX files "
            "by --data, as Debian's package dataset-fashion-mnist installs them"
        ) from error
    return Labelled("fashion-mnist", x_train, y_train, x_test, y_test)


def _cut(
    name: str, labelled: Labelled, asked: str | None = None, validation: tuple[np.ndarray, np.ndarray] | None = None
) -> Data:
    """Check, scale and shuffle the samples and hold some out; always the same ones for the same samples."""
    task = asked or task_of(labelled.y)
    held = None if validation is None else Labelled(labelled.source, labelled.x, labelled.y, *validation).checked(task)
    labelled = labelled.checked(task)
    random = np.random.default_rng(0)
    x, y = labelled.x, labelled.y
    split = _stratified if task == "classification" else _split
    if labelled.x_test is None or labelled.y_test is None:
        kept, tested = split(random, y, TEST_SHARE)
        x_test, y_test = x[tested], y[tested]
        x, y = x[kept], y[kept]
    else:
        x_test, y_test = labelled.x_test, labelled.y_test
    if held is None or held.x_test is None or held.y_test is None:
        kept, held_out = split(random, y, min(VALIDATION_SHARE, len(x_test) / len(x)))
        x_held, y_held = x[held_out], y[held_out]
    else:
        kept, _ = split(random, y, 0.0)
        x_held, y_held = held.x_test, held.y_test
    parts = (x[kept], y[kept], x_held, y_held, x_test, y_test)
    classes = len(np.unique(y)) if task == "classification" else y.shape[1]
    for part, what in zip(parts[::2], ("training", "validation", "test"), strict=True):
        if len(part) == 0:
            raise InputError(f"{labelled.source} is too small: no sample is left for {what}; five of each class are enough")
    train, validated, test = (
        (np.ascontiguousarray(x), np.ascontiguousarray(y)) for x, y in zip(parts[::2], parts[1::2], strict=True)
    )
    return Data(name, *train, *validated, *test, classes=classes, task=task, chosen=asked is None)


def _split(random: np.random.Generator, y: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle indices into two parts, the second with `share` of all."""
    order = random.permutation(len(y))
    size = min(max(1, round(share * len(y))), len(y) - 1) if share else 0
    return order[size:], order[:size]


def _stratified(random: np.random.Generator, y: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle indices into two parts, the second with `share` of the samples of every class, never the last of one."""
    first, second = [], []
    for label in np.unique(y):
        members = random.permutation(np.flatnonzero(y == label))
        size = min(max(1, round(share * len(members))), len(members) - 1) if share else 0
        first.append(members[size:])
        second.append(members[:size])
    return random.permutation(np.concatenate(first)), random.permutation(np.concatenate(second))
