"""The torch model that `evennorm compare` hands over: the accuracy that is told is that of the file, which is made once."""

import numpy as np
import pytest

from evennorm.tools.compare import compare

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
