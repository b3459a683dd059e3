"""Lightning's callback leaves the exact statistics: on a stub of Lightning, and on itself where it is installed."""

import importlib.util
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.tools.populations import check

random = np.random.default_rng(0)
X = torch.tensor((random.normal(size=(60, 4)) * [1, 5, 0.1, 2] + [0, 30, -2, 1]).astype("float32"))
INSTALLED = importlib.util.find_spec("lightning") is not None


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 1))


def loader(x=X):
    return DataLoader(TensorDataset(x, torch.zeros(len(x), 1)), batch_size=16)


def check_all(layers, x=X):
    first, linear, act, second, _ = layers
    check(first, x.double().numpy())
    layers.eval()
    with torch.no_grad():
        check(second, act(linear(first(x))).double().numpy())


@pytest.fixture
def callbacks(monkeypatch):
    """`evennorm.torch.lightning`, over a stub where Lightning is not installed."""
    if not INSTALLED:
        pytorch = types.ModuleType("lightning.pytorch")
        pytorch.Callback = type("Callback", (), {})
        package = types.ModuleType("lightning")
        package.pytorch = pytorch
        monkeypatch.setitem(sys.modules, "lightning", package)
        monkeypatch.setitem(sys.modules, "lightning.pytorch", pytorch)
    monkeypatch.delitem(sys.modules, "evennorm.torch.lightning", raising=False)
    return importlib.import_module("evennorm.torch.lightning")


@pytest.mark.parametrize("data", [loader, lambda: loader, lambda: X, lambda: TensorDataset(X)])
def test_training_ends_with_the_statistics_of_the_data(callbacks, data) -> None:
    model, at_end = network(), callbacks.Recalibrate(data(), batch_size=25)
    at_end.on_fit_start(None, model)
    model.train()(X[:16])  # what training leaves
    at_end.on_train_end(None, model)
    assert model.training
    assert at_end.report.samples == 60
    assert [(layer.name, layer.values) for layer in at_end.report.layers] == [("0", 60), ("3", 60)]
    check_all(model)


def test_values_that_are_not_finite_leave_what_was_trained(callbacks) -> None:
    broken = X.clone()
    broken[50, 2] = torch.inf
    model, at_end = network(), callbacks.Recalibrate(loader(broken))
    at_end.on_fit_start(None, model)
    model(X[:16])
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(RuntimeWarning, match="was not recalibrated.*batch 4 reaches '0' with values that are not finite"):
        at_end.on_train_end(None, model)
    assert at_end.report is None
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_lightning_is_asked_for_by_name() -> None:
    code = (
        "import sys; sys.modules['lightning'] = None\nimport evennorm.torch\n"
        "try: import evennorm.torch.lightning\nexcept evennorm.errors.MissingExtra as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.count("\n") == 1
    assert "evennorm.torch.lightning needs the package lightning" in said
    assert "pip install 'evennorm[lightning]'" in said


@pytest.mark.skipif(not INSTALLED, reason="lightning is not installed; the tests above run on a stub of it")
def test_lightning_itself(callbacks, tmp_path) -> None:
    """A training, and one that is resumed from its checkpoint."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def forward(self, x):
            return self.layers(x)

        def training_step(self, batch, number):
            loss = (self(batch[0]) - 1).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    def trained(epochs, path=None):
        module, at_end = Module(), callbacks.Recalibrate(loader)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = lightning.Trainer(max_epochs=epochs, callbacks=[at_end], default_root_dir=tmp_path, **quiet)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader(), ckpt_path=path)
        assert at_end.report.samples == 60
        check_all(module.layers)
        return trainer, module

    trainer, module = trained(1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    weight = module.layers[1].weight.detach().clone()
    trainer, module = trained(2, tmp_path / "first.ckpt")
    assert trainer.current_epoch == 2
    assert not torch.equal(module.layers[1].weight, weight)
