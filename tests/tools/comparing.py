"""What the tests of `evennorm compare` share: a small comparison as a command, a process and a record, and its traces."""

import csv
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner

import evennorm
from evennorm.cli import main
from evennorm.tools.compare.settings import Settings
from evennorm.tools.compare.train import Record

ENGINE = keras.config.backend()
TINY = """
import keras
from keras import layers as L

def network(input_shape, classes):
    return keras.Sequential([keras.Input(input_shape), L.Dense(4, "tanh"), L.Dropout(0.1), L.Dense(classes, "softmax")])
"""
SOURCES = str(Path(evennorm.__file__).parents[1])


def write_points(folder: Path) -> Path:
    path = folder / "points.npz"
    random = np.random.default_rng(0)
    x = random.normal(size=(120, 2)).astype("float32")
    y = (x[:, 0] > x[:, 1]).astype(int)
    np.savez(path, x_train=x[:100], y_train=y[:100], x_test=x[100:], y_test=y[100:])
    (folder / "tiny_network.py").write_text(TINY)
    return path


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """What lies in `folder` can be imported, here and in processes started from here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([SOURCES, str(folder)]))
        yield


def options(data, out, **changes):
    values = {
        "data": data,
        "model": "tiny_network:network",
        "placements": "none,before",
        "repeats": 3,
        "learning-rates": "0.1,0.5",
        "epochs": 3,
        "batch-size": 16,
        "engine": ENGINE,
        "out": out,
    }
    values |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def command(data, out, *flags, **changes):
    return CliRunner().invoke(main, ["compare", *options(data, out, **changes), *flags], prog_name="evennorm")


def process(data, out, first="pass", **changes):
    """The same command in a process of its own, which can be killed."""
    if ENGINE != "tensorflow":
        first += "; import sys; sys.modules['tensorflow'] = None"  # Keras would load it, for seconds, only to seed it
    program = f"{first}\nfrom evennorm.cli import main; main(prog_name='evennorm')"
    return subprocess.Popen(
        [sys.executable, "-c", program, "compare", *options(data, out, **changes)],
        env=os.environ | {"KERAS_BACKEND": ENGINE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def table_of(out):
    """runs.csv without what a clock says."""
    with open(Path(out, "runs.csv"), encoding="utf-8", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds_per_epoch"} for row in csv.DictReader(file)]


def selected(out, *values):
    """The rows that begin with these values: placement, rate, repeat."""
    return [row for row in table_of(out) if tuple(row.values())[: len(values)] == values]


def trials(out, state=None):
    """How many trials are in a state, read while others write."""
    try:
        connection = sqlite3.connect(f"file:{Path(out, 'study.sqlite3')}?mode=ro", uri=True, timeout=10)
        try:
            return connection.execute("select count(*) from trials where state like ?", [state or "%"]).fetchone()[0]
        finally:
            connection.close()
    except sqlite3.OperationalError:  # not there yet
        return 0


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def refused(result):
    """The one line that a refused command prints."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("evennorm: ")
    return line


def settings(out, **changes):
    values = {
        "data": "points",
        "model": "paper-mlp",
        "placements": ("none", "before"),
        "repeats": 2,
        "learning_rates": (0.1,),
        "epochs": 2,
        "batch_size": 16,
        "engine": ENGINE,
        "seed": 0,
        "out": str(out),
    }
    return Settings(**values | changes)


def record(test=0.5, validation=0.5, **changes):
    values = {"test_accuracy": [0.1, test], "test_loss": [1.0, 1.0], "train_accuracy": [0.2, test + 0.1]}
    values |= {"train_loss": [1.0, 1.0], "seconds": [9.0, 2.0], "validation_accuracy": validation, "diverged": False}
    return Record(**values | changes)
