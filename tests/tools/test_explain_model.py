"""`evennorm explain MODEL`: each layer's shape, axis and values per mean, against what the layers themselves say."""

from __future__ import annotations

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from keras import layers
from torch import nn

from evennorm.cli import main
from evennorm.keras import BatchNormalization
from evennorm.tools.explain.model import explain_model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


def images() -> keras.Model:
    shared = BatchNormalization(name="shared")
    inputs = keras.Input((12, 10, 3), name="images")
    x = layers.Conv2D(8, 3, name="conv")(inputs)
    x = shared(layers.BatchNormalization(name="theirs")(x))
    x = layers.GlobalAveragePooling2D()(shared(layers.ReLU()(x)))
    return keras.Model(inputs, BatchNormalization(name="end")(layers.Dense(5)(x)), name="images")


def test_each_layer_once_with_its_shape_and_axis() -> None:
    explained = explain_model(images(), batch_size=32)
    assert [layer.name for layer in explained.layers] == ["theirs", "shared", "end"]
    shapes = [layer.explanation.geometry.shape for layer in explained.layers]
    assert shapes == [(32, 10, 8, 8), (32, 10, 8, 8), (32, 5)]
    assert [layer.explanation.geometry.axis for layer in explained.layers] == [(3,), (3,), (1,)]
    for layer, count in zip(explained.layers, (32 * 80, 32 * 80, 32), strict=True):
        assert layer.explanation.geometry.count == count
        # Of a normal distribution the variance of n values is off by sqrt(2 / (n - 1)).
        assert layer.explanation.as_dict()["variance_relative_error"] == pytest.approx(np.sqrt(2 / (count - 1)))


def test_sizes_that_a_model_leaves_open() -> None:
    assert explain_model(images()).rows()[0][1:] == ("(?, 10, 8, 8)", "3", "8", "? x 10 x 8 = 80 per sample", "")


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x) if x.sum() > 0 else x


def test_torch_models_tell_their_shapes_by_a_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4), nn.BatchNorm1d(4))
    assert [layer.explanation for layer in explain_model(model).layers] == [None, None]
    assert explain_model(model, shape=(16, 3, 8, 8)).rows() == [
        ("1", "(16, 8, 6, 6)", "1", "8", "16 x 6 x 6 = 576", "5.9 %"),
        ("4", "(16, 4)", "1", "4", "16", "37 %"),
    ]
    (row,) = explain_model(Branching(), shape=(4, 3, 8, 8)).rows()
    assert row[0] == "bn"


def test_the_axis_is_held_against_the_neighbours_not_the_shape() -> None:
    """Channels-last images of 3 rows look like channels-first ones by their shape alone."""
    right = keras.Sequential([keras.Input((3, 28, 28)), layers.Conv2D(4, 1), layers.BatchNormalization()])
    assert explain_model(right).findings == ()
    wrong = keras.Sequential([keras.Input((28, 28, 3)), layers.Conv2D(4, 1), layers.BatchNormalization(axis=1, name="bn")])
    (finding,) = explain_model(wrong).findings
    assert (finding.code, finding.layer) == ("BN101", "bn")


def test_the_command(tmp_path: Path) -> None:
    images().save(tmp_path / "net.keras")
    result = run(tmp_path / "net.keras", "--batch-size", 32)
    lines = result.output.splitlines()
    assert (result.exit_code, lines[0], lines[-1]) == (0, "images: 3 batch normalizations", "Nothing looks wrong.")
    assert lines[3].split(maxsplit=1)[0] == "theirs"
    assert "32 x 10 x 8 = 2,560" in lines[3]
    few = run(tmp_path / "net.keras", "--batch-size", 2)
    assert few.exit_code == 1
    assert "BN505 warning: end: each mean is computed from 2 values" in few.output
    answer = json.loads(run(tmp_path / "net.keras", "--json").output)
    assert [layer["layer"] for layer in answer["layers"]] == ["theirs", "shared", "end"]
    assert answer["layers"][0]["explanation"]["shape"] == [None, 10, 8, 8]


def test_a_model_without_batch_normalization(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((3,)), layers.Dense(2)], name="plain").save(tmp_path / "plain.keras")
    result = run(tmp_path / "plain.keras")
    assert (result.exit_code, result.output) == (0, "plain: 0 batch normalizations\n\nNothing looks wrong.\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "explain takes MODEL, or --shape of an array, as in --shape 32,28,28,3; received neither"),
        (["net.keras", "--axis", "1"], "--axis is given without MODEL: each layer of a model has an axis of its own"),
        (["net.keras", "--svg", "x.svg"], "--svg is given without MODEL"),
        (
            ["--shape", "3,4", "--batch-size", "3"],
            "--batch-size is given with MODEL: the batch of an array is the first size",
        ),
        (["net.keras", "--shape", "?,3"], "--shape of a model's inputs needs all sizes"),
        (["nowhere.keras"], "there is no file nowhere.keras"),
    ],
)
def test_what_cannot_be_answered_is_one_line(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert words in result.stderr
