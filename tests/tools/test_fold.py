"""`evennorm fold` as a program and as a command: files, reports, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from keras import layers as L  # noqa: N812
from torch import nn

from evennorm.cli import main
from evennorm.errors import InputError
from evennorm.keras import BatchNormalization
from evennorm.tools.fold import fold


def evennorm(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def trained(model: keras.Model) -> keras.Model:
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization | BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    return model


def small() -> keras.Model:
    x = keras.Input((8, 8, 3), name="image")
    y = L.BatchNormalization(name="first")(L.Conv2D(4, 3, use_bias=False, name="conv")(x))
    y = BatchNormalization(activation="relu", name="second")(L.ReLU(name="relu")(y), residual=y)
    return trained(keras.Model(x, L.Dense(2, name="head")(L.Flatten()(y)), name="small"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.keras"
    small().save(path)
    return path


def net() -> nn.Module:
    """What the tests name by module:function."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    with torch.no_grad():
        for norm in (model[1], model[3]):
            norm.running_mean.normal_()
            norm.weight.normal_()
    return model


def noisy() -> nn.Module:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x)) + torch.randn(3)

    return Noisy()


def broken() -> nn.Module:
    model = net()
    with torch.no_grad():
        model[1].running_mean.fill_(float("nan"))
    return model


NET = f"{__name__}:net"
X = np.random.default_rng(0).normal(size=(5, 8, 8, 3)).astype("float32")


def test_a_keras_file(file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    output = tmp_path / "folded.keras"
    result = evennorm("fold", file, "-o", output)
    assert result.exit_code == 0, result.output
    first, second, _, summary, difference, faster, written = result.output.splitlines()
    assert first == "first   folded into conv, behind which it stood"
    assert second.startswith("second  one scale and shift: the activation relu stands in between; it applies relu itself")
    assert summary == "1 of 2 batch normalizations folded, 1 now one scale and shift"
    assert difference.endswith("over 5 samples, random inputs")
    assert "times as fast:" in faster
    assert written == f"written to {output}"
    assert file.read_bytes() == before
    np.testing.assert_allclose(
        keras.saving.load_model(output).predict(X, verbose=0),
        keras.saving.load_model(file).predict(X, verbose=0),
        atol=1e-5,
    )


def test_the_file_loads_without_evennorm(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "folded.keras"
    fold(file, output, measure=False)
    code = (
        "import sys; sys.modules['evennorm'] = None; import keras; print(len(keras.saving.load_model(sys.argv[1]).layers))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(output)], capture_output=True, text=True, check=True)
    assert int(run.stdout) == 8


def test_the_same_bytes_each_time(file: Path, tmp_path: Path) -> None:
    """Also in another process, whose addresses and clock are others."""
    pairs = [(tmp_path / f"here{suffix}", tmp_path / f"there{suffix}") for suffix in (".keras", ".h5")]
    for here, _ in pairs:
        fold(file, here, measure=False)
    code = "import sys; from evennorm.tools.fold import fold; [fold(sys.argv[1], x, measure=False) for x in sys.argv[2:]]"
    there = [str(there) for _, there in pairs]
    subprocess.run([sys.executable, "-c", code, str(file), *there], capture_output=True, check=True)
    for here, other in pairs:
        assert here.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
def test_a_torch_model(tmp_path: Path, suffix: str) -> None:
    first, second = (tmp_path / f"{name}{suffix}" for name in "ab")
    for output in (first, second):
        result = evennorm("fold", NET, "-o", output, "--json", "--no-speed")
        assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [each["outcome"] for each in report["layers"]] == ["folded", "scale and shift"]
    assert report["difference"]["relative"] < 1e-5
    assert (report["speed"], report["output"]) == (None, str(second))
    assert first.read_bytes() == second.read_bytes()
    x = torch.from_numpy(X).movedim(-1, 1)[:, :, :, :7]
    expected = net().eval()(x)
    if suffix == ".pt2":
        torch.testing.assert_close(torch.export.load(first).module()(x), expected, atol=1e-5, rtol=1e-5)
    else:
        assert sorted(torch.load(first, weights_only=True)) == ["0.bias", "0.weight", "3.scale", "3.shift"]


def test_given_data_are_compared_too(file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=X)
    report = fold(file, data=tmp_path / "data.npz", measure=False)
    assert (report.difference.samples, report.data) == (10, f"random inputs and {tmp_path / 'data.npz'}")
    report = fold(net(), data=X.transpose(0, 3, 1, 2), measure=False)
    assert report.difference.samples == 10


def test_inputs_that_torch_models_do_not_show() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(7, 3), nn.BatchNorm1d(3)

        def forward(self, words: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.embed(words)) + x

    report = fold(Two(), input_shape=[(), (3,)], measure=False)
    assert report.layers[0].into == ("embed",)
    with pytest.raises(InputError, match="Two takes 2 inputs; say what one sample is by --input-shape"):
        fold(Two(), measure=False)
    with pytest.raises(InputError, match="Linear does not run on samples of shape 5"):
        fold(nn.Linear(3, 2), input_shape=[(5,)])


def test_nothing_is_written_beyond_the_tolerance(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "folded.keras"
    output.write_text("as it was")
    result = evennorm("fold", file, "-o", output, "--tolerance", "0")
    assert result.exit_code == 2
    assert "of the largest output, and 0 is allowed; nothing was written; see --tolerance" in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert output.read_text() == "as it was"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing.keras", "-o", "b.keras"], "there is no file nothing.keras"),
        (["model.keras", "-o", "b.txt"], "Keras models are written to .keras or .h5; received 'b.txt'"),
        (["model.keras", "-o", "b.pt2"], "Keras models are written to .keras or .h5; received 'b.pt2'"),
        ([NET, "-o", "b.keras"], "folded torch models are written to .pt2, as a program"),
        (["model.keras", "-o", "no/b.keras"], "it is a folder, or in none"),
        (["cut.keras", "-o", "b.keras"], "cut.keras is damaged or cut short"),
        (["model.keras", "-o", "b.keras", "--data", "wrong.npz"], "its input 'image' takes samples of shape 8 x 8 x 3"),
        (["model.keras", "-o", "b.keras", "--data", "empty.npz"], "empty"),
        (["model.keras", "-o", "b.keras", "--input-shape", "3,4"], "--input-shape is for torch models"),
        ([NET, "-o", "b.pt", "--input-shape", "3,x"], "--input-shape takes the sizes of one sample, as in 3,224,224"),
        ([NET, "-o", "b.pt", "--data", "wrong.npz"], "wrong.npz does not fit"),
        ([NET, "-o", "b.pt", "--tolerance", "-1"], "the tolerance is a part of the largest output, 0 or more"),
        ([f"{__name__}:noisy", "-o", "b.pt"], "gives other outputs each time, so that nothing can be verified"),
        ([f"{__name__}:broken", "-o", "b.pt"], "gives outputs that are not finite"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], told: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cut.keras").write_bytes(file.read_bytes()[:2000])
    np.savez("wrong.npz", x=X[:, 1:, :, :2])
    np.savez("empty.npz", x=X[:0])
    there = {path.name for path in tmp_path.iterdir()}
    result = evennorm("fold", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == there


def test_a_model_without_batch_normalization() -> None:
    report = fold(keras.Sequential([keras.Input((3,)), L.Dense(2)]), measure=False)
    assert report.text().startswith("no batch normalization in it")
