"""`evennorm check --fix`: what it drops, what it sets, what it leaves, and that the predictions stay where they should."""

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
from evennorm.tools.check import check
from evennorm.tools.check.fix import Fixed, fix
from evennorm.tools.data import open_data
from evennorm.tools.models import Opened, open_model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


def fixed(model: object, path: Path, data: object = None) -> tuple[Fixed, Opened]:
    opened = open_model(model)
    source = None if data is None else open_data(data, opened.framework)
    report = check(opened, None if source is None else source.batches(32))
    return fix(opened, report, source, path, batch_size=32), opened


def scrambled(model: keras.Model) -> keras.Model:
    """A model with weights as after training, in a random state."""
    random = np.random.default_rng(3)
    model.set_weights([random.uniform(0.2, 1.5, weight.shape) for weight in model.get_weights()])
    return model


def keras_model() -> keras.Model:
    """Biases before normalization in a nested model, behind two calls, and one that something else reads."""
    inner = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(name="bn"), layers.ReLU()],
        name="inner",
    )
    x, z = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    y = layers.Subtract()([inner(x), inner(z)])
    y = layers.SeparableConv2D(5, 3, name="separable")(y)
    y = layers.ReLU()(layers.BatchNormalization(name="bn2")(y))
    kept = layers.Dense(4, name="kept")(y)
    y = layers.Add()([layers.BatchNormalization(name="bn3")(kept), kept])
    return scrambled(keras.Model([x, z], layers.Dense(2, name="out")(layers.GlobalAveragePooling2D()(y)), name="net"))


def test_keras_biases_are_dropped_and_predictions_stay(tmp_path: Path) -> None:
    model = keras_model()
    random = np.random.default_rng(0)
    x = [random.normal(size=(4, 8, 8, 3)).astype("float32") for _ in range(2)]
    before = model.predict(x, verbose=0)
    weights = [np.array(weight) for weight in model.get_weights()]
    done, _ = fixed(model, tmp_path / "new.keras")
    assert set(done.biases) == {"inner/conv", "separable"}
    assert done.difference == pytest.approx(0, abs=1e-5)
    new = keras.saving.load_model(tmp_path / "new.keras")
    np.testing.assert_allclose(new.predict(x, verbose=0), before, rtol=2e-5, atol=2e-5)
    assert not new.get_layer("inner").get_layer("conv").use_bias
    assert new.get_layer("kept").use_bias
    bias, mean = (model.get_layer(n).get_weights()[i] for n, i in (("separable", -1), ("bn2", 2)))
    np.testing.assert_allclose(new.get_layer("bn2").get_weights()[2], mean - bias, rtol=1e-6, atol=1e-6)
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
    assert not {f.code for f in check(tmp_path / "new.keras").findings} & {"BN201"}


def test_a_compiled_model_stays_compiled_and_knows_its_steps(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.BatchNormalization(momentum=0.5), layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.25), "mse")
    model.fit(np.ones((64, 6), "float32") * np.arange(6), np.ones((64, 1)), batch_size=8, verbose=0)
    fixed(model, tmp_path / "new.keras")
    new = keras.saving.load_model(tmp_path / "new.keras")
    assert int(new.optimizer.iterations) == 8
    assert float(new.optimizer.learning_rate) == 0.25
    new.fit(np.ones((8, 6), "float32"), np.ones((8, 1)), verbose=0)


def torch_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(16, 3, 6, 6) * 3 + 1)
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
    return model


def test_torch_biases_are_dropped_and_predictions_stay(tmp_path: Path) -> None:
    model = torch_model()
    x = np.random.default_rng(0).normal(1, 3, (64, 3, 6, 6)).astype("float32")
    before = model.eval()(torch.from_numpy(x))
    opened = open_model(model)
    report = check(opened)
    done = fix(opened, report, None, tmp_path / "new.pt")
    assert (done.biases, done.difference) == (("0",), None)
    fresh = torch_model()
    fresh[0] = nn.Conv2d(3, 4, 3, bias=False)
    fresh.load_state_dict(torch.load(tmp_path / "new.pt", weights_only=True))
    torch.testing.assert_close(fresh.eval()(torch.from_numpy(x)), before, rtol=1e-4, atol=1e-5)
    assert model[0].bias is not None


@pytest.mark.parametrize("suffix", ["keras", "pt"])
def test_statistics_are_set_from_data(tmp_path: Path, suffix: str) -> None:
    """A layer that was never updated gets the exact mean and variance of what reaches it."""
    x = np.random.default_rng(0).normal(5, 2, (96, 6)).astype("float32")
    if suffix == "keras":
        model = keras.Sequential([keras.Input((6,)), layers.BatchNormalization(name="bn"), layers.Dense(2)])
        model.get_layer("bn").gamma.assign(np.linspace(0.5, 1.5, 6))
    else:
        model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2))
        nn.init.uniform_(model[0].weight)
    done, _ = fixed(model, tmp_path / f"new.{suffix}", x)
    assert len(done.recalibrated) == 1
    assert done.difference > 0.1
    if suffix == "keras":
        mean, variance = keras.saving.load_model(tmp_path / "new.keras").get_layer("bn").get_weights()[2:]
        untouched = model.get_layer("bn").get_weights()[2]
    else:
        state = torch.load(tmp_path / "new.pt", weights_only=True)
        mean, variance = state["0.running_mean"].numpy(), state["0.running_var"].numpy()
        untouched = model[0].running_mean.numpy()
    np.testing.assert_allclose(mean, x.mean(0, dtype="float64"), rtol=1e-6)
    np.testing.assert_allclose(variance, x.var(0, dtype="float64"), rtol=1e-6)
    assert np.all(untouched == 0)


def test_what_is_left_is_said(tmp_path: Path) -> None:
    shared = layers.BatchNormalization(name="bn")
    x = keras.Input((6,))
    y = layers.Add()([shared(layers.Dense(4, name="a")(x)), shared(layers.Dense(4, name="b")(x))])
    model = scrambled(keras.Model(x, layers.Dense(2)(y)))
    done, _ = fixed(model, tmp_path / "new.keras")
    assert done.biases == ()
    assert any("the bias of a, since bn also normalizes other values" in left for left in done.left)


def test_the_command(tmp_path: Path) -> None:
    keras_model().save(tmp_path / "net.keras")
    result = run(tmp_path / "net.keras", "--fix", "-o", tmp_path / "new.keras")
    assert result.exit_code == 1
    assert "Fixed: dropped 2 biases: inner/conv, separable\n" in result.output
    assert "from those of the old model, on 8 samples of random numbers\n" in result.output
    assert result.output.endswith(f"Written: {tmp_path / 'new.keras'}\n")
    answer = json.loads(run(tmp_path / "net.keras", "--fix", "-o", tmp_path / "b.keras", "--json").output)
    assert answer["fixed"]["biases"] == ["inner/conv", "separable"]
    assert answer["fixed"]["difference"] < 1e-5


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keras_model().save(tmp_path / "net.keras")
    before = (tmp_path / "net.keras").read_bytes()
    (tmp_path / "new.keras").write_bytes(before)

    def fails(self: keras.Model, path: object) -> None:
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keras.Model, "save", fails)
    result = run(tmp_path / "net.keras", "--fix", "-o", tmp_path / "new.keras")
    assert result.exit_code == 2
    assert "No space left" in result.stderr
    assert (tmp_path / "new.keras").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.keras", "new.keras"]


def test_statistics_that_serve_better_than_the_datas_stay(tmp_path: Path) -> None:
    """One class alone, as a folder of one kind of images is: by its own statistics half of it would be the other class."""
    random = np.random.default_rng(0)
    x = random.normal(3, 1, (400, 1)).astype("float32")
    model = keras.Sequential([keras.Input((1,)), layers.BatchNormalization(name="bn"), layers.Dense(2, name="out")])
    model.get_layer("bn").set_weights([np.array([value]) for value in (1.0, 0.0, 0.25, 1.0)])
    model.get_layer("out").set_weights([np.array([[-1.0, 1.0]]), np.zeros(2)])
    np.savez(tmp_path / "data.npz", x=x, y=np.ones(len(x), int))
    model.save(tmp_path / "old.keras")
    result = run(tmp_path / "old.keras", "--data", tmp_path / "data.npz", "--fix", "-o", tmp_path / "new.keras")
    assert result.exit_code == 1
    assert "recalibrating would lose accuracy" in " ".join(result.output.split())
    assert "--fix takes care" not in result.output
    assert "the model is more accurate by them than by those of this data" in result.output
    new = keras.saving.load_model(tmp_path / "new.keras")
    assert new.get_layer("bn").get_weights()[2:] == [[0.25], [1.0]]
