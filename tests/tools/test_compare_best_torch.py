"""The torch model that `evennorm compare` hands over: the accuracy that is told is that of the file, which is made once."""

import numpy as np
import pytest

from evennorm.tools.compare import compare
from evennorm.tools.programs import open_program
from evennorm.torch.placement import sites

torch = pytest.importorskip("torch")
NETWORK = """
from torch import nn

def network(classes: int, input_shape) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, classes))
"""


def test_the_program_has_the_accuracy_that_is_told(data, tmp_path, monkeypatch):
    (tmp_path / "torch_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "results"
    asked = {"placements": ["before"], "repeats": 1, "learning_rates": [0.5], "epochs": 2, "batch_size": 16, "out": str(out)}
    best = compare(data, "torch_network:network", **asked).best
    assert best.files == ("best.pt2", "best.pt")
    assert best.samples == 100
    with np.load(data) as file:
        x, y = torch.from_numpy(file["x_test"]), file["y_test"]
    outputs = torch.export.load(out / "best.pt2").module()(x)
    assert (outputs.argmax(1).numpy() == y).mean() == best.test_accuracy
    assert {"0.weight", "4.bias"} <= set(torch.load(out / "best.pt", weights_only=True))
    before = (out / "best.pt2").read_bytes()
    assert compare(data, "torch_network:network", **asked).best == best
    assert (out / "best.pt2").read_bytes() == before
    # The file is a model for the next comparison, in which its normalization is placed anew.
    again = compare(data, str(out / "best.pt2"), **asked | {"out": str(tmp_path / "again")})
    assert again.best.files == best.files
    found = sites(open_program(out / "best.pt2").model, input_shape=(2,))
    assert [site.name for site in found if site.is_activation] == ["1", "3"]
    assert type(open_program(tmp_path / "again" / "best.pt2").model.get_submodule("2_bn")) is torch.nn.BatchNorm1d


def test_many_labels_and_an_own_metric(tmp_path, monkeypatch):
    """The value is scikit-learn's for the program that was written; where all is right, the interval is not empty."""
    from sklearn.metrics import mean_squared_error

    random = np.random.default_rng(0)
    x = random.normal(size=(90, 2)).astype("float32")
    y = (np.stack([x[:, 0], x[:, 1], x[:, 0] + x[:, 1]], axis=1) > 0).astype("float32")
    np.savez(tmp_path / "labels.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    (tmp_path / "torch_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    asked = {"placements": ["before"], "repeats": 1, "learning_rates": [0.5], "epochs": 20, "batch_size": 16}
    data = str(tmp_path / "labels.npz")
    best = compare(data, "torch_network:network", metric="mse", out=str(tmp_path / "mse"), **asked).best
    given = torch.from_numpy(x[60:])
    shares = torch.export.load(tmp_path / "mse" / "best.pt2").module()(given).sigmoid().detach().double().numpy()
    assert best.test_accuracy == pytest.approx(mean_squared_error(y[60:], shares), rel=1e-5)
    assert best.low < best.test_accuracy < best.high
    best = compare(data, "torch_network:network", out=str(tmp_path / "labels"), **asked).best
    shares = torch.export.load(tmp_path / "labels" / "best.pt2").module()(given).sigmoid().detach().numpy()
    assert best.test_accuracy == pytest.approx(((shares > 0.5) == (y[60:] > 0.5)).mean())
    assert 0 < best.low < best.high <= 1


def test_other_normalizations_stand_in_the_table_and_in_the_model(data, tmp_path, monkeypatch):
    (tmp_path / "torch_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    asked = {"repeats": 1, "learning_rates": [0.5], "epochs": 1, "batch_size": 16, "out": str(tmp_path / "results")}
    norms = ["layer", "group", "rms"]
    found = compare(data, "torch_network:network", placements=["before"], norms=norms, **asked)
    assert [row.placement for row in found.table] == ["before:layer", "before:group", "before:rms"]
    losses = {record.train_loss[-1] for record in found.records.values()}
    assert len(losses) == 3
    state = torch.load(tmp_path / "results" / "best.pt", weights_only=True)
    assert {"0_bn.weight", "2_bn.weight"} <= set(state)
