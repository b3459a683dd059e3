"""The command: what it prints and writes, and that bad input is one line, exit code 2 and no file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from keras import layers

from evennorm.cli import main
from evennorm.models.program import Call
from evennorm.tools.recalibrate.schedule import stages
from tests.tools.populations import check

random = np.random.default_rng(0)
X = (random.normal(size=(60, 4)) * 3 + 1).astype("float32")
NETS = """
import numpy as np, torch
from torch import nn
def net(): return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
def batches():
    for i in range(3): yield np.ones((5, 4), "float32") * i
def nothing(): return []
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    model = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(name="bn"), layers.Dense(2, activation="softmax")]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(X, np.arange(60) % 2, verbose=0)  # so that the optimizer has a state
    model.save("model.keras")
    np.savez("data.npz", x=X, y=np.arange(60) % 2)
    np.savez("wrong.npz", x=X[:, :3])
    np.savez("empty.npz", x=X[:0])
    np.savez("short.npz", x=X, y=np.arange(7))
    np.savez("nan.npz", x=X * np.nan)
    Path("cut.keras").write_bytes(Path("model.keras").read_bytes()[:900])
    Path("recalibrate_nets.py").write_text(NETS)
    yield tmp_path
    sys.modules.pop("recalibrate_nets", None)


def command(*arguments):
    return CliRunner().invoke(main, ["recalibrate", *arguments])


def test_a_keras_file(folder) -> None:
    result = command("model.keras", "--data", "data.npz", "-o", "out.keras", "--batch-size", "16")
    assert result.exit_code == 0, result.output
    assert "model.keras on data.npz: 1 layer, 60 samples, 1 pass" in result.output
    assert "accuracy: " in result.output
    model = keras.saving.load_model("out.keras")
    check(model.get_layer("bn"), X)
    old = keras.saving.load_model("model.keras")
    for a, b in zip(model.layers[1].weights, old.layers[1].weights, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (a, b)))
    assert model.compiled


def test_a_torch_function_and_json(folder) -> None:
    import torch

    result = command("recalibrate_nets:net", "--data", "recalibrate_nets:batches", "-o", "out.pt", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["samples"], found["layers"][0]["values"], found["effect"]["measure"]) == (15, 15, None)
    state = torch.load("out.pt", weights_only=True)
    assert state["0.running_mean"].tolist() == [1, 1, 1, 1]
    again = command(
        "recalibrate_nets:net", "--weights", "out.pt", "--data", "recalibrate_nets:batches", "-o", "2.pt", "--json"
    )
    assert json.loads(again.stdout)["layers"][0]["shift"] < 1e-6


BAD = {
    "wrong.npz": "takes samples of shape 4; received 3",
    "empty.npz": "is empty",
    "short.npz": "one label for each sample",
    "nan.npz": "not finite",
    "gone.npz": "there is no gone.npz",
    "recalibrate_nets:nothing": "is empty",
}


@pytest.mark.parametrize("data", BAD)
@pytest.mark.parametrize("there", [False, True])
def test_bad_data(folder, data, there) -> None:
    before = Path("model.keras").read_bytes()
    if there:
        Path("out.keras").write_bytes(before)
    result = command("model.keras", "--data", data, "-o", "out.keras")
    assert result.exit_code == 2
    assert BAD[data] in result.stderr
    assert result.stderr.count("\n") == 1
    assert Path("out.keras").read_bytes() == before if there else not Path("out.keras").exists()
    assert not list(folder.glob("*.part*"))


@pytest.mark.parametrize(
    ("model", "output", "words"),
    [
        ("cut.keras", "out.keras", "damaged or cut short"),
        ("gone.keras", "out.keras", "there is no file"),
        ("model.keras", "out.txt", ".keras or .h5"),
        ("model.keras", "gone/out.keras", "in none"),
        ("recalibrate_nets:nothing", "out.keras", "a model is"),
        ("recalibrate_nets:net", "out.keras", ".safetensors or .pt"),
    ],
)
def test_bad_models_and_outputs(folder, model, output, words) -> None:
    result = command(model, "--data", "data.npz", "-o", output)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path(output).exists()


def test_data_larger_than_memory(folder) -> None:
    """600 MB of samples pass through a process that takes less than half of that beyond what it starts with."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not say how much memory a process takes")
    array = np.lib.format.open_memmap("x.npy", "w+", "float32", (150_000, 1000))
    array[:] = 1
    array[::2] = 3
    del array
    code = (
        "import numpy as np, keras\n"
        "from evennorm.tools.recalibrate import recalibrate\n"
        "model = keras.Sequential([keras.Input((1000,)), keras.layers.BatchNormalization(), keras.layers.Dense(2)])\n"
        "model.predict(np.ones((512, 1000)), verbose=0)\n"
        "read = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])\n"
        "before, peak = read(), []\n"
        "recalibrate(model, 'x.npy', batch_size=512, progress=lambda *step: peak.append(read()))\n"
        "print(max(peak) - before, float(keras.ops.convert_to_numpy(model.layers[0].moving_mean)[0]))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    grown, mean = run.stdout.split()
    assert float(mean) == 2.0
    assert int(grown) < 250_000


def call(name, *inputs):
    return Call(name, inputs, (name,), lambda values: ())


def test_layers_that_depend_on_each_other_are_one_stage() -> None:
    # a -> b -> a: the second call of a is behind b.
    first, then = stages([call("1", "x"), call("2", "1"), call("3", "2"), call("4", "3")], [["a"], ["b"], ["a"], ["c"]])
    assert first.paths == ("a", "b")
    assert first.repeated == ("a", "b")
    assert (then.paths, then.calls, then.stops) == (("c",), (0, 1, 2, 3), (3,))


def test_a_call_of_several_layers_is_taken_in_their_order() -> None:
    found = stages([call("1", "x")], [["a", "b", "c"]])
    assert [stage.paths for stage in found] == [("a",), ("b",), ("c",)]
