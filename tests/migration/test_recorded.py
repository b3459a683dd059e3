"""Files that Keras 1 itself wrote predict what it recorded beside them."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

from evennorm.tools.migrate import migrate

DATA = Path(__file__).parents[1] / "data" / "keras1"
FILES = [
    ("keras-1.2.2-article-cnn.h5", None, "keras-1.2.2-article-cnn.npz", "Keras 1.2.2 on tensorflow"),
    ("keras-1.0.5-dense.weights.h5", "keras-1.0.5-dense.json", "keras-1.0.5-dense.npz", "Keras 1.0.5 on tensorflow"),
]


@pytest.mark.parametrize(("file", "architecture", "record", "origin"), FILES)
def test_recorded_predictions(file, architecture, record, origin, tmp_path):
    report = migrate(DATA / file, tmp_path / "new.keras", architecture=architecture and DATA / architecture)
    assert report.written_by == origin
    recorded = np.load(DATA / record)
    got = keras.saving.load_model(tmp_path / "new.keras").predict_on_batch(recorded["x"])
    np.testing.assert_allclose(got, recorded["y"], rtol=0, atol=1e-5)
    assert {type(layer).__module__.split(".")[0] for layer in report.model.layers} == {"keras"}  # runs without evennorm


def test_the_report_of_the_standard_deviation():
    name, architecture, *_ = FILES[1]
    layers = {x.old: x for x in migrate(DATA / name, architecture=DATA / architecture).layers}
    assert layers["batchnormalization_1"].converted == (
        "the fourth weight s was a standard deviation: variance (s + epsilon)^2 - epsilon",
    )
    assert all(not x.converted and not x.assumed for name, x in layers.items() if name != "batchnormalization_1")


def test_what_is_not_carried_over_is_said():
    report = migrate(DATA / FILES[0][0])
    assert report.notes == (
        "compile the model anew: loss, metrics and optimizer are not carried over (it had loss 'mse', optimizer SGD)",
    )
