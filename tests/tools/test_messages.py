"""What people write at first, and the one line that tells them what to write instead."""

from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from keras import layers as L  # noqa: N812

from evennorm.cli import main

MODULE = "a module is named as in an import, without .py and with dots for folders; write {}"
FUNCTION = "{} is a module; name the function in it too, as in {}:build"
COMMAS = "takes sizes with commas in between; received {!r}; write {}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("evennorm_net.py").write_text("import torch\ndef build(): return torch.nn.Linear(3, 2)\n")
    Path("nets").mkdir()
    Path("nets/small.py").write_text("def build(): pass\n")
    x = np.zeros((4, 3), "float32")
    np.savez("data.npz", x=x, y=np.arange(4) % 2)
    np.savez("other.npz", a=np.zeros(3))
    np.savez("half.npz", x_train=x, y_train=np.arange(4) % 2, x_test=x)
    keras.Sequential([keras.Input((4,)), L.ReLU()], name="plain").save("plain.keras")
    recurrent = [L.LSTM(2, name=f"layer{i}", return_sequences=True) for i in range(5)]
    keras.Sequential([keras.Input((4, 3)), *recurrent], name="recurrent").save("recurrent.keras")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("check evennorm_net.py:build", MODULE.format("evennorm_net:build")),
        ("check nets/small.py:build", MODULE.format("nets.small:build")),
        ("fold ./nets/small.py:build -o a.pt", MODULE.format("nets.small:build")),
        ("recalibrate plain.keras --data nets/small.py:data -o b.keras", MODULE.format("nets.small:data")),
        ("recalibrate plain.keras --data evennorm_net.py:data -o b.keras", MODULE.format("evennorm_net:data")),
        ("compare --model evennorm_net.py:build", MODULE.format("evennorm_net:build")),
        ("check evennorm_net", FUNCTION.format("evennorm_net.py", "evennorm_net")),
        ("check evennorm_net.py", FUNCTION.format("evennorm_net.py", "evennorm_net")),
        ("fold nets.small -o a.pt", FUNCTION.format("nets/small.py", "nets.small")),
        ("fold nets/small.py -o a.pt", FUNCTION.format("nets/small.py", "nets.small")),
        ("recalibrate plain.keras --data evennorm_net -o b.keras", FUNCTION.format("evennorm_net.py", "evennorm_net")),
        ("compare --model evennorm_net", FUNCTION.format("evennorm_net.py", "evennorm_net")),
        ("migrate data.npz -o a.keras", "'data.npz' is an archive of NumPy arrays (.npz) and no model: it holds x, y; give"),
        ("migrate plain.keras -o a.keras", "is a zip archive, as Keras 3 writes .keras files; it needs no migration"),
        ("compare --data other.npz", "or x and y alone; x_train, y_train, x_test, y_test are missing; it holds a"),
        ("compare --data half.npz", "or x and y alone; y_test is missing; it holds x_train, y_train, x_test"),
        ("explain --shape 32x3x28", f"--shape {COMMAS.format('32x3x28', '32,3,28')}"),
        ("check evennorm_net:build --shape 32x3x28", f"--shape {COMMAS.format('32x3x28', '32,3,28')}"),
        ("fold evennorm_net:build -o a.pt --input-shape 3X28X28", f"--input-shape {COMMAS.format('3X28X28', '3,28,28')}"),
        (
            "migrate plain.keras --to torch -o a.safetensors",
            "plain has no layer to write for torch (none of its layers has we",
        ),
        (
            "migrate recurrent.keras --to torch -o a.safetensors",
            "LSTMCell has no counterpart that is written here; and 2 more)",
        ),
    ],
)
def test_one_clear_line(words: str, told: str, folder: Path) -> None:
    there = {path.name for path in folder.iterdir()}
    result = CliRunner().invoke(main, words.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert {path.name for path in folder.iterdir()} - {"__pycache__", "evennorm-runs"} == there


def test_what_is_written_right_is_taken(folder: Path) -> None:
    """A file of that name comes first, and sizes of other forms stay what they were."""
    keras.Sequential([keras.Input((4,)), L.Dense(3), L.BatchNormalization()]).save("evennorm_net.keras")
    assert CliRunner().invoke(main, ["check", "evennorm_net.keras"]).exit_code == 1
    for shape in ("32,3,28", "(32, 3, 28)", "?,3", "32"):
        assert CliRunner().invoke(main, ["explain", "--shape", shape]).exit_code in (0, 1)
