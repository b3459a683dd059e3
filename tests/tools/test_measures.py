"""What `check` and `recalibrate` say about the same data: one quantity by one name, and what each figure is of."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from keras import layers as L  # noqa: N812
from torch import nn

from evennorm.cli import main
from evennorm.keras import BatchNormalization
from evennorm.tools.check import check
from evennorm.tools.recalibrate import recalibrate

RNG = np.random.default_rng(0)
X = RNG.normal(2, 3, (96, 5)).astype("float32")
Y = RNG.integers(0, 3, 96)


def two_layers() -> keras.Model:
    """Moving statistics that are off; dense layers between them."""
    keras.utils.set_random_seed(0)
    x = keras.Input((5,), name="x")
    y = L.ReLU()(L.BatchNormalization(name="first")(x))
    model = keras.Model(x, L.Dense(3)(L.BatchNormalization(name="second")(L.Dense(4)(y))))
    for layer in (model.get_layer("first"), model.get_layer("second")):
        size = layer.moving_mean.shape
        layer.moving_mean.assign(RNG.normal(size=size))
        layer.moving_variance.assign(RNG.uniform(0.5, 2, size))
    return model


def drift_of(x: np.ndarray, layer: L.BatchNormalization) -> float:
    mean, variance = (
        np.asarray(keras.ops.convert_to_numpy(v), "float64") for v in (layer.moving_mean, layer.moving_variance)
    )
    return float(np.sqrt(np.mean((x.astype("float64").mean(0) - mean) ** 2 / (variance + layer.epsilon))))


@pytest.mark.parametrize("one_pass", [False, True])
def test_drift_is_one_quantity(one_pass: bool) -> None:
    """Of the first layer always; of the others where recalibration measures them as check does, in one pass."""
    model = two_layers()
    expected = drift_of(X, model.get_layer("first"))
    measured = {each.name: each.drift for each in check(model, [(X, None)]).measurements.layers}
    done = recalibrate(model, X, batch_size=len(X), one_pass=one_pass)
    moved = {each.name: each.drift for each in done.layers}
    assert measured["first"] == pytest.approx(expected, rel=1e-5)
    assert moved["first"] == pytest.approx(expected, rel=1e-5)
    # Where one batch is all the data, the recalibrated layer in front normalizes by that batch too.
    assert moved["second"] == pytest.approx(measured["second"], rel=1e-3)
    largest = max(each.shift for each in done.layers)
    assert largest > max(moved.values()), "the channel that moved most, in other deviations"


def test_both_commands_say_what_their_figures_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    two_layers().save("model.keras")
    np.savez("data.npz", x=X, y=Y)
    checked = CliRunner().invoke(main, ["check", "model.keras", "--data", "data.npz"])
    assert "(moving ones; root mean square over channels; all layers" in checked.output
    assert "normalize by the batch; recalibrate measures each after" in checked.output
    words = "recalibrate model.keras --data data.npz -o new.keras --batches 20 --batch-size 40"
    done = CliRunner().invoke(main, words.split())
    assert done.exit_code == 0, done.output
    assert (
        "drift          root mean square over the channels, in old standard deviations, as in `evennorm check" in done.output
    )
    assert "20 batches were asked for, and data.npz holds 3 batches: the statistics are of all of them" in done.output
    assert "the accuracy is measured on the data of the statistics, which makes it too good" in done.output
    found = json.loads(CliRunner().invoke(main, [*words.split(), "--json"]).stdout)
    assert [layer["drift"] > 0 for layer in found["layers"]] == [True, True]
    assert len(found["notes"]) == 2


@pytest.mark.parametrize(("asked", "told"), [(2, False), (3, False), (4, True), (None, False)])
def test_batches_that_are_not_there(asked: int | None, told: bool) -> None:
    notes = recalibrate(two_layers(), X, batches=asked, batch_size=40).notes
    assert any("the statistics are of all of them" in note for note in notes) == told
    model = nn.Sequential(nn.BatchNorm1d(5))
    loader = torch.utils.data.DataLoader(torch.from_numpy(X), batch_size=40)
    notes = recalibrate(model, loader, batches=asked, measure=False).notes
    assert any("the statistics are of all of them" in note for note in notes) == told


def test_no_score_no_word_about_it() -> None:
    assert recalibrate(two_layers(), X).notes == ()
    assert recalibrate(two_layers(), (X, Y), measure=False).notes == ()


def findings(model: object, **settings: object) -> dict[str, str]:
    return {each.code: f"{each.layer}: {each.what} -> {each.remedy}" for each in check(model, **settings).findings}


def test_batch_statistics_at_inference_in_every_form() -> None:
    old = keras.Sequential([keras.Input((4,)), L.Dense(8, "relu"), BatchNormalization(mode=2, name="old"), L.Dense(2)])
    assert "old: it is of mode 2, and so normalizes by the batch at inference too -> use mode=0" in findings(old)["BN506"]
    for mode in (0, 1):
        norm = BatchNormalization(mode=mode)
        assert "BN506" not in findings(keras.Sequential([keras.Input((4,)), L.Dense(8, "relu"), norm, L.Dense(2)]))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 2))
    told = "2: it keeps no running statistics, and so normalizes by the batch at inference too -> keep running statistics"
    assert told in findings(model)["BN506"]
    model[2] = nn.BatchNorm1d(8)
    assert "BN506" not in findings(model)


@pytest.mark.parametrize(
    ("code", "model"),
    [
        ("BN101", [keras.Input((28, 28, 3)), L.Conv2D(8, 3), L.BatchNormalization(axis=1, name="bn"), L.ReLU()]),
        (
            "BN102",
            [
                keras.Input((3, 28, 30)),
                L.Permute((1, 2, 3)),
                L.ZeroPadding2D(1, data_format="channels_first"),
                L.BatchNormalization(name="bn"),
                L.MaxPooling2D(data_format="channels_first"),
            ],
        ),
    ],
)
def test_the_axis_of_a_trained_layer_is_not_to_be_changed(code: str, model: list[L.Layer]) -> None:
    model = keras.Sequential(model)
    warning = "changing it breaks the model until it is trained anew -> use axis="
    assert warning not in findings(model)[code]
    model.get_layer("bn").moving_mean.assign(np.ones(model.get_layer("bn").moving_mean.shape))
    assert warning in findings(model)[code]
    assert "axis=" in findings(model)[code]
