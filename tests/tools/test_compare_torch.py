"""`evennorm compare` trains models of PyTorch: the same training written in plain torch beside it, and what it refuses."""

import importlib
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from evennorm.cli import main
from evennorm.errors import InputError, MissingExtra
from evennorm.tools.compare import compare, framework, settings_for
from evennorm.tools.compare.data import Data
from evennorm.tools.compare.settings import Run
from evennorm.tools.compare.torch_models import load_torch_model
from evennorm.tools.compare.torch_train import TorchTrainer
from evennorm.tools.compare.train import seed_of
from evennorm.tools.compare.work import prepare
from tests.tools.comparing import importable, refused, settings, table_of

NETS = """
import torch
from torch import nn

def build(input_shape, classes):
    return nn.Sequential(nn.Conv2d(input_shape[0], 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes))

def fixed(classes, made=[]):
    made += [] if made else [nn.Sequential(nn.Flatten(), nn.Linear(36, classes), nn.Softmax(-1))]
    return made[0]

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(36, 3))
    def forward(self, x):
        return x.flatten(1) @ self.weight

def own():
    return Own()

def wrong(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(36, classes + 1))

def needing(width):
    return nn.Linear(width, 1)

def branching(classes):
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)
    return Branching(nn.Flatten(), nn.Linear(36, classes))

def nothing() -> nn.Module:
    return None
"""


@pytest.fixture(scope="module", autouse=True)
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    (folder / "torch_nets.py").write_text(NETS)
    with importable(folder):
        yield folder


def samples():
    random = np.random.default_rng(0)

    def part(size):
        y = np.arange(size) % 3
        return (y[:, None, None, None] / 3 + random.random((size, 1, 6, 6)) / 2).astype("float32"), y

    return Data("made", *part(40), *part(12), *part(20), classes=3)


def trainer(model="torch_nets:build", **changes):
    chosen = settings("out", **{"batch_size": 8, "framework": "torch", "engine": "torch", "device": "cpu"} | changes)
    return TorchTrainer(chosen, samples(), load_torch_model(model, samples()))


@pytest.mark.parametrize("placement", ["as-is", "before"])
def test_a_run_is_the_same_training_in_plain_torch(placement):
    data, seed = samples(), seed_of(0, 1)
    record = trainer().train(Run(placement, 0.1, 1))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    if placement == "before":
        model.insert(1, nn.BatchNorm2d(4))
        model[0].bias = None
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    random = np.random.default_rng(seed)
    images = torch.from_numpy(data.x_train)
    for epoch in range(2):
        model.train()
        order = random.permutation(40)
        for i in range(5):
            chosen = order[8 * i : 8 * i + 8]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), torch.from_numpy(data.y_train[chosen])).backward()
            optimizer.step()
        model.eval()
        y = model(torch.from_numpy(data.x_test)).detach()
        loss = nn.functional.cross_entropy(y.double(), torch.from_numpy(data.y_test))
        assert record.test_loss[epoch] == pytest.approx(float(loss), rel=1e-4)
        assert record.test_accuracy[epoch] == (y.argmax(1).numpy() == data.y_test).mean()
    assert len(record.seconds) == 2


def test_runs_do_not_depend_on_those_before_and_repeats_differ():
    one, other = trainer(), trainer()
    run, later = Run("before", 0.1, 0), Run("before", 0.1, 1)
    first = one.train(run)
    other.train(Run("none", 0.5, 1))
    assert (first.test_loss, first.train_loss) == ((again := other.train(run)).test_loss, again.train_loss)
    assert one.train(later).test_loss != first.test_loss
    weights = [one.initial(Run(name, 0.1, 0)).get_submodule("0").weight for name in ("none", "before", "as-is")]
    assert all(torch.equal(weights[0], other) for other in weights[1:])


def test_weights_that_a_function_does_not_draw_are_drawn_anew():
    found = trainer("torch_nets:fixed")
    first, second = (found.initial(Run("as-is", 0.1, i))[1].weight.clone() for i in (0, 1))
    assert not torch.equal(first, second)
    assert not found.architecture.from_logits  # it ends in a softmax
    assert trainer().architecture.from_logits


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("torch_nets:wrong", r"gives outputs of shape \(4,\); made has 3 classes, which needs \(3,\)"),
        ("torch_nets:needing", "width needs a default"),
        ("torch_nets:absent", "torch_nets has no function 'absent'"),
        ("torch_nets:nothing", "must return a torch.nn.Module .* received NoneType"),
        ("torch_nets:own", r"those of 'the model' \(Own\) cannot be drawn anew; give it reset_parameters\(\)"),
        ("net.pt2", "there is no model file net.pt2; save one by torch.export.save"),
        ("net.pt", "a file of torch weights holds no architecture; received net.pt"),
    ],
)
def test_refusals(model, text):
    with pytest.raises(InputError, match=text) as caught:
        load_torch_model(model, samples()).build()
    assert "\n" not in str(caught.value)


def exported(model, path):
    batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(model, (torch.zeros(2, 1, 6, 6),), dynamic_shapes=batch), path)
    return str(path)


@pytest.fixture(scope="module")
def program(nets):
    """Layers made in another order than they are called, exported with weights that are not to matter."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 3)
            self.drop = nn.Dropout(0.25)
            self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.head(self.drop(torch.relu(self.bn(self.conv(x))).flatten(1)))

    importlib.import_module("torch_nets").Net = Net
    return exported(Net().eval(), nets / "net.pt2")


@pytest.mark.parametrize("placement", ["as-is", "none", "before", "after"])
def test_a_program_trains_as_the_model_that_it_was_exported_from(placement, program):
    run = Run(placement, 0.1, 1)
    wanted, found = trainer("torch_nets:Net").train(run), trainer(program).train(run)
    assert (found.test_loss, found.train_loss) == (wanted.test_loss, wanted.train_loss)
    assert found.test_loss[0] != found.test_loss[1]


def test_a_parameter_of_no_layer_cannot_be_drawn(nets):
    class Scaled(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(36, 3))
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return super().forward(x) * self.scale

    path = exported(Scaled().eval(), nets / "scaled.pt2")
    with pytest.raises(
        InputError, match=r"how those of its parameter 'scale' are drawn, .* and is read by mul; give --model"
    ):
        load_torch_model(path, samples())


def test_a_placement_that_torch_fx_cannot_make_is_told_before_training():
    told = "branching has no placement 'before': only models whose code torch.fx can follow .*; torch.export does not record"
    with pytest.raises(InputError, match=told) as caught:
        load_torch_model("torch_nets:branching", samples()).place("before")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_models_of_libraries(library, monkeypatch):
    """A package that stands for the library notes how it is called."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=f"^--model {library}:tiny needs the package {library}"):
        load_torch_model(f"{library}:tiny", samples())
    seen = {}

    def made(name, num_classes, **options):
        seen.update(options, name=name)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, num_classes))

    models = types.SimpleNamespace(get_model=made, get_model_builder=lambda name: made)
    stub = types.SimpleNamespace(create_model=made, models=models)
    monkeypatch.setitem(sys.modules, library, stub)
    assert framework.framework_of(f"{library}:tiny") == "torch"
    placed = load_torch_model(f"{library}:tiny", samples()).place("before")
    assert placed.get_submodule("1_bn").num_features == 5
    wanted = {"timm": {"pretrained": False, "in_chans": 1}, "torchvision": {"weights": None}}[library]
    assert seen == {"name": "tiny", **wanted}


def test_the_framework_is_told_by_a_functions_module(nets):
    (nets / "keras_nets.py").write_text("import keras, torch\ndef build(): ...\ndef said() -> torch.nn.Module: ...\n")
    (nets / "inner_nets.py").write_text("def build():\n    from torch import nn\n    return nn.Identity()\n")
    names = ("torch_nets:build", "torch_nets:Own", "keras_nets:build", "keras_nets:said", "inner_nets:build", "net.pt2")
    assert [framework.framework_of(name) for name in names] == ["torch", "torch", "keras", "torch", "torch", "torch"]


@pytest.fixture(scope="module")
def compared(nets, tmp_path_factory):
    path = nets / "points.npz"
    x = np.random.default_rng(0).normal(size=(120, 6, 6)).astype("float32")
    np.savez(path, x=x, y=(x.mean((1, 2)) > 0).astype(int))
    out = tmp_path_factory.mktemp("compared")
    given = {"data": str(path), "model": "torch_nets:build", "placements": ["none", "before"], "repeats": 2, "epochs": 1}
    given |= {"learning_rates": [0.1], "batch_size": 16}
    return compare(**given, out=str(out / "one")), given, out


def test_a_whole_comparison_and_again(compared):
    found, given, out = compared
    assert found.settings.framework == "torch"
    assert found.device.startswith("torch on cpu")
    assert "keras" not in found.fingerprint["versions"]
    assert [row.placement for row in found.table] == ["none", "before"]
    compare(**given, out=str(out / "two"))
    assert table_of(out / "one") == table_of(out / "two")
    more = compare(**given | {"repeats": 3}, out=str(out / "one"))  # goes on where it stopped
    assert [row.repeats for row in more.table] == [3, 3]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model", "torch_nets:build", "--engine", "jax"], "a torch.nn.Module is trained by torch; received --engine jax"),
        (["--model", "torch_nets:build", "--device", "tpu"], "devices here are cpu.*; received --device tpu"),
        (["--model", "torch_nets:build", "--device", "cpu:x"], "devices here are cpu.*; received --device cpu:x"),
        (["--model", "torch_nets:build", "--device", "cpu:1"], "devices here are cpu.*; received --device cpu:1"),
        (["--model", "torch_nets:build", "--device", ""], "--device is empty; give it a value, or leave it out"),
        (["--model", "paper-mlp", "--device", "cpu"], "--device is for models of PyTorch"),
        (["--model", "net.pt2"], "there is no model file net.pt2"),
        (["--model", "torch_nets:build", "--task", "ranking"], "tasks are .*; received 'ranking'"),
        (["--model", "torch_nets:build", "--metric", "goodness"], "write goodness:max or goodness:min"),
        (["--model", "torch_nets:build", "--metric", "accuracy_of_what"], "or a class of torchmetrics, such as AUROC"),
    ],
)
def test_bad_options_are_one_line(options, text, compared, tmp_path):
    command = ["compare", "--data", compared[1]["data"], "--repeats", "2", "--out", str(tmp_path / "out"), *options]
    line = refused(CliRunner().invoke(main, command, prog_name="evennorm"))
    assert re.search(text, line)
    assert not Path(tmp_path, "out").exists()


def test_keras_is_not_needed(compared, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)  # importing it fails
    found = settings_for(compared[1]["data"], "torch_nets:build", ["none"], 2, None, 1, None, None, None, None, 0)
    assert found.engine == "torch"
    assert "keras" not in prepare(found)[2]["versions"]
