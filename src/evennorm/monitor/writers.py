"""Write summaries to TensorBoard, to a CSV file, or to a function."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

from evennorm.errors import ArgumentError, InputError, MissingExtra
from evennorm.monitor.summary import FIELDS

To = str | os.PathLike[str] | Callable[[int, str, Mapping[str, float]], Any]
"""A folder for TensorBoard, a file that ends in .csv, or a function of step, layer and numbers."""


class Writer(Protocol):
    """Take the numbers of all layers after a step."""

    def write(self, step: int, layers: Mapping[str, Mapping[str, float]]) -> None: ...

    def close(self) -> None: ...


def writer_to(to: To) -> Writer:
    """Return what writes to a place.

    Raises:
        ArgumentError: something else than a path or a function.
        InputError: a file that holds something else, or a place that cannot be written to.
        MissingExtra: TensorBoard's files need the package tensorboardX.
    """
    if callable(to):
        return _Function(to)
    if not isinstance(to, str | os.PathLike):
        raise ArgumentError(
            "a monitor writes to a folder (for TensorBoard), a file .csv, or a function of step, layer and numbers; "
            f"received {type(to).__name__}"
        )
    path = Path(to)
    if path.suffix.lower() == ".csv":
        return _Csv(path)
    if path.is_file() or (path.suffix[1:].isalpha() and not path.is_dir()):  # lr0.1 is a folder's name
        raise ArgumentError(f"a monitor writes to a folder (for TensorBoard) or a file .csv; received {str(path)!r}")
    return _TensorBoard(path)


class _Function:
    def __init__(self, function: Callable[[int, str, Mapping[str, float]], Any]):
        self._function = function

    def write(self, step: int, layers: Mapping[str, Mapping[str, float]]) -> None:
        for layer, numbers in layers.items():
            self._function(step, layer, numbers)

    def close(self) -> None:
        """A function has nothing to close."""


class _Csv:
    """Appends a row per layer and step; the rows of a step are written at once, so that an interrupt leaves whole ones."""

    HEADER = ("step", "layer", *FIELDS)

    def __init__(self, path: Path):
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open(newline="", encoding="utf-8") if path.exists() else io.StringIO() as file:
                first = next(csv.reader(file), None)
            if first is not None and tuple(first) != self.HEADER:
                raise InputError(f"{path} holds something else than the log of a monitor; give another file")
            if first is None:
                self._append([self.HEADER])
            else:
                self._end_last_row()
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} cannot be used as the log of a monitor: {error}; give another file") from error

    def write(self, step: int, layers: Mapping[str, Mapping[str, float]]) -> None:
        self._append([(step, layer, *(found.get(name, "") for name in FIELDS)) for layer, found in layers.items()])

    def close(self) -> None:
        """Every write is complete by itself."""

    def _end_last_row(self) -> None:
        """A row that a crash cut off must not swallow the next one."""
        with self._path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")

    def _append(self, rows: list[tuple[Any, ...]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            file.write(text.getvalue())


class _TensorBoard:
    """Writes one event per step, with a number per tag: an event for each number would take ten times as long."""

    def __init__(self, folder: Path):
        try:
            import tensorboardX  # noqa: F401
        except ImportError as error:
            raise MissingExtra("logging to TensorBoard", "tensorboard", "tensorboardX", "give a file .csv") from error
        self._folder = folder
        self._file: Any = None
        self._open()  # so that a place that cannot be written to is told before the training

    def write(self, step: int, layers: Mapping[str, Mapping[str, float]]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        if self._file is None:  # another training with the same monitor
            self._open()
        values = [
            Summary.Value(tag=f"{layer}/{name}", simple_value=value)
            for layer, numbers in layers.items()
            for name, value in numbers.items()
        ]
        self._file.add_summary(Summary(value=values), step)
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        from tensorboardX import FileWriter

        try:
            # Two files of one second and host would have one name otherwise, and the second would begin the first anew.
            self._file = FileWriter(str(self._folder), filename_suffix=f".{os.getpid()}.{token_hex(4)}")
        except OSError as error:
            raise InputError(f"{self._folder} cannot be written to: {error.strerror}; give another folder") from error
