"""Write the curves of finished runs for TensorBoard: one folder for each run, with one file that is replaced as a whole."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from evennorm.errors import InputError, MissingExtra
from evennorm.tools.compare.settings import Run

if TYPE_CHECKING:
    from evennorm.tools.compare.train import Record

OURS = ".evennorm-"
"""Part of the names of files that are written here; other files stay as they are."""

Scalar = tuple[str, float, int]
"""Tag, value, and the epoch, counted from 1."""


def check(folder: str) -> None:
    """Refuse, before anything is trained, a place that curves cannot be written to.

    Raises:
        InputError: no folder can be there.
        MissingExtra: TensorBoard's files need the package tensorboardX.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise MissingExtra("--tensorboard", "tensorboard", "tensorboardX")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(mkdtemp(dir=folder))
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_runs(folder: str, records: Mapping[Run, Record], metric: str) -> None:
    """Write the curves of each run into a folder of its own; a file that has the same curves already stays.

    Args:
        folder: what `tensorboard --logdir` is given.
        records: finished runs.
        metric: by which the runs were judged.

    Raises:
        InputError: it cannot be written.
    """
    try:
        for run, record in records.items():
            _write(Path(folder, folder_name(run)), list(scalars(record, metric)))
    except OSError as error:
        raise _unwritable(folder, error) from error


def folder_name(run: Run) -> str:
    """Return placement, rate and repeat, and the factor of the initial weights where it is not 1.

    Example:
        >>> folder_name(Run("before:layer", 0.1, 2)), folder_name(Run("none", 0.5, 0, 4.0))
        ('before-layer-0.1-2', 'none-0.5-0-x4')
    """
    name = f"{run.placement.replace(':', '-')}-{run.learning_rate!r}-{run.repeat}"
    return name if run.scale == 1 else f"{name}-x{run.scale:g}"


def scalars(record: Record, metric: str) -> Iterator[Scalar]:
    """Yield what is known of each epoch: loss and metric on training and test samples, the loss on validation samples where
    it decides when training ends, and their metric after the last epoch. Losses that are not finite are left out."""
    columns: dict[str, Sequence[float | None]] = {
        "loss/train": record.train_loss,
        "loss/validation": record.validation_loss,
        "loss/test": record.test_loss,
        f"{metric}/train": record.train_accuracy,
        f"{metric}/test": record.test_accuracy,
    }
    for tag, values in columns.items():
        yield from ((tag, value, epoch) for epoch, value in enumerate(values, 1) if value is not None)
    yield f"{metric}/validation", record.validation_accuracy, len(record.seconds)


def _write(folder: Path, found: list[Scalar]) -> None:
    from tensorboardX import SummaryWriter

    suffix = OURS + hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
    old = [path for path in folder.glob("events.out.tfevents.*") if OURS in path.name] if folder.is_dir() else []
    if len(old) == 1 and old[0].name.endswith(suffix):
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(prefix=".", suffix=".part", dir=folder))
    try:
        with SummaryWriter(str(partial), filename_suffix=suffix) as writer:
            for tag, value, epoch in found:
                writer.add_scalar(tag, value, epoch)
        (made,) = partial.iterdir()
        for path in old:
            path.unlink()
        made.replace(folder / made.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(folder: str, error: OSError) -> InputError:
    return InputError(f"--tensorboard {folder} cannot be written to: {error.strerror}; choose a folder that takes new files")
