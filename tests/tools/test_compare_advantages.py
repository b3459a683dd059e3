"""The measured advantages of batch normalization: by hand where they cost nothing, and one real training where they do."""

from dataclasses import replace

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn
from torch.nn import functional

from evennorm.keras import BatchNormalization
from evennorm.keras.place import place
from evennorm.tools.compare.advantages import advantages
from evennorm.tools.compare.data import Data
from evennorm.tools.compare.drift import UnitInput, travel
from evennorm.tools.compare.keras_train import KerasTrainer
from evennorm.tools.compare.models import Architecture
from evennorm.tools.compare.praise import told
from evennorm.tools.compare.racing import planned, race
from evennorm.tools.compare.settings import Run
from evennorm.tools.compare.torch_drift import UnitInput as TorchUnitInput
from evennorm.tools.compare.torch_models import TorchArchitecture
from evennorm.tools.compare.torch_train import TorchTrainer
from evennorm.torch import place as torch_place
from tests.tools.comparing import record, settings

STEP = 0.01


def found(given, records, scaled=None):
    return {each.placement: each for each in advantages(given, records, scaled or {}, race(given, records, STEP), STEP)}


def run(curve, **changes):
    return record(test_accuracy=curve, train_accuracy=[curve[-1] + 0.1] * len(curve), seconds=[9.0, 2.0, 2.0], **changes)


def test_time_is_that_to_the_end_of_the_run_of_none_with_the_same_seed(tmp_path):
    given = settings(tmp_path)
    curves = {"none": [[0.1, 0.3, 0.5], [0.1, 0.3, 0.6]], "before": [[0.5, 0.5, 0.7], [0.5, 0.5, 0.7]]}
    each = found(given, {r: run(curves[r.placement][r.repeat]) for r in given.runs})
    assert each["none"].epochs_to_none.mean == each["none"].epochs_of_none == 3
    way = each["before"].epochs_to_none
    # epochs 1 and 3: t(0.975, 1 degree of freedom) = 12.7062 times a standard error of 1; none is before the first
    assert (way.mean, way.low, way.high) == (2, 1, pytest.approx(2 + 12.7062, rel=1e-5))
    assert each["before"].seconds_to_none == 4.0
    assert each["before"].gap.mean == pytest.approx(0.1)


def test_one_that_does_not_get_there_has_no_mean(tmp_path):
    given = settings(tmp_path)
    curves = {"none": [[0.1, 0.3, 0.5]] * 2, "before": [[0.5, 0.5, 0.7], [0.1, 0.2, 0.3]]}
    each = found(given, {r: run(curves[r.placement][r.repeat]) for r in given.runs})["before"]
    assert (each.epochs_to_none, each.reached) == (None, 1)
    assert "  before: 1 of 2 repeats get there" in told(given, [each])


def test_where_none_learned_nothing_there_is_nothing_to_reach(tmp_path):
    given = settings(tmp_path)
    each = found(given, {r: run([0.1, 0.1, 0.5], learned=r.placement != "none") for r in given.runs})
    assert list(each) == ["before"]
    assert each["before"].epochs_to_none is None
    assert told(given, list(each.values()))[0] == "time: none did not learn, so that there is nothing to reach"


def test_learning_rates_that_are_tolerated(tmp_path):
    given = settings(tmp_path, learning_rates=(0.1, 0.2, 0.3, 0.4), placements=("before",), repeats=4)
    cost = {0.1: [0.0] * 4, 0.2: [0.01, 0.02, 0.01, 0.02], 0.3: [0.2, 0.21, 0.2, 0.19], 0.4: [0.0, 0.1, 0.0, 0.1]}
    each = found(given, {r: run([0.9 - cost[r.learning_rate][r.repeat]] * 3) for r in given.runs})["before"]
    assert (each.tolerated, each.costly) == ((0.1, 0.2), (0.3,))
    assert "  before: 0.1, 0.2; 0.3 cost more; 0.4 not known" in told(given, [each])


def test_runs_from_other_initial_weights_follow_the_race(tmp_path):
    """At the chosen rate alone, and only once nothing else is left to train."""
    given = settings(tmp_path, learning_rates=(0.1, 0.2), advantages=True, repeats=2)
    trained = {r: run([0.8] * 3, validation=0.9 - r.learning_rate) for r in given.runs}
    assert planned(given, {}, STEP) == given.runs
    more = planned(given, trained, STEP)[len(given.runs) :]
    assert sorted(more) == sorted(Run(p, 0.1, i, s) for p in ("none", "before") for i in range(2) for s in (0.25, 4.0))
    scaled = {r: run([0.8 if r.scale > 1 else 0.3] * 3) for r in more}
    [(small, cost), (large, same)] = found(given, trained, scaled)["none"].scales
    assert (small, large) == (0.25, 4.0)
    assert (cost.mean, same.mean) == (pytest.approx(0.5), pytest.approx(0))


def errors(given, curves):
    """Runs of an error, of which less is better."""
    return {
        r: record(test_accuracy=curve, train_accuracy=[curve[-1] - 0.5], seconds=[9.0, 2.0, 2.0])
        for r in given.runs
        for curve in [curves[r.placement, r.learning_rate]]
    }


def test_of_an_error_less_is_better(tmp_path):
    task = {"task": "regression", "metric": "mean_absolute_error", "equivalent": 0.0, "advantages": True}
    given = settings(tmp_path, learning_rates=(0.1, 0.2, 0.3), repeats=4, **task)
    curves = {("before", rate): [4.0, end, end] for rate, end in ((0.1, 2.0), (0.2, 2.05), (0.3, 2.3))}
    curves |= {("none", rate): [9.0, 8.0, 3.0] for rate in given.learning_rates}
    trained = errors(given, curves)
    scaled = {Run("before", 0.1, i, 4.0): record(test=2.0 + cost) for i, cost in enumerate((0.5, 0.6, 0.7))}
    each = found(given, trained, scaled)["before"]
    assert each.epochs_to_none.mean == 2
    assert each.gap.mean == pytest.approx(0.5)  # the error on test samples is larger by as much
    assert (each.tolerated, each.costly) == ((0.1, 0.2), (0.3,)), "5 % of 2 are 0.1"
    [(scale, cost)] = each.scales
    assert (scale, cost.mean) == (4.0, pytest.approx(0.6))
    # t(0.975, 2 degrees of freedom) = 4.3027 times a standard error of 0.1 / sqrt(3)
    assert (cost.low, cost.high) == (pytest.approx(0.6 - 0.2484, abs=1e-4), pytest.approx(0.6 + 0.2484, abs=1e-4))
    lines = told(given, [each])
    assert lines[0] == "time: epochs until the test mean absolute error that none ends at, at the rates marked *"
    assert "tolerance: learning rates within 5 % of the best one, of those tried" in lines
    assert "overfitting: how much better the mean absolute error is on training than on test samples" in lines
    assert "initial weights: test mean absolute error that it costs to multiply them" in lines
    assert "  before: by 4: 0.6 (0.352 to 0.848)" in lines
    assert lines[-1] == "steadiness is not known of before: no hidden unit was found, or its input stood still"


def test_time_needs_runs_of_none(tmp_path):
    given = settings(tmp_path, placements=("before", "after"))
    each = found(given, {r: run([0.5, 0.5, 0.7]) for r in given.runs})
    assert told(given, [*each.values()])[0] == "time: none is not among the placements, so that there is nothing to reach"


def network():
    return keras.Sequential(
        [keras.Input((2,)), layers.Dense(4, "tanh"), layers.Dense(3, "tanh"), layers.Dense(2, "softmax")]
    )


def dense(layer, x):
    kernel, *bias = (np.asarray(keras.ops.convert_to_numpy(v), "float64") for v in layer.variables)
    return x @ kernel + (bias[0] if bias else 0)  # in front of a normalization there is none


def normalized(layer, x):
    values = {v.name: np.asarray(keras.ops.convert_to_numpy(v), "float64") for v in layer.variables}
    scale = values["gamma"] / np.sqrt(values["moving_variance"] + layer.epsilon)
    return (x - values["moving_mean"]) * scale + values["beta"]


@pytest.mark.parametrize("where", ["none", "before", "after"])
def test_the_input_of_a_unit_is_that_of_the_textbook(where):
    keras.utils.set_random_seed(0)
    model = place(network(), where)
    x = np.random.default_rng(0).normal(size=(200, 2)).astype("float32")
    model.compile("sgd", "sparse_categorical_crossentropy")
    observed = UnitInput(model, x)
    model.fit(x, (x[:, 0] > 0).astype(int), epochs=2, verbose=0)  # what is looked at changes after it was built
    first, second, _ = (layer for layer in model.layers if isinstance(layer, layers.Dense))
    norms = [layer for layer in model.layers if isinstance(layer, BatchNormalization)]
    hidden = dense(first, x.astype("float64"))
    if where == "before":
        seen = normalized(norms[1], dense(second, np.tanh(normalized(norms[0], hidden))))
    elif where == "after":
        seen = dense(second, normalized(norms[0], np.tanh(hidden)))
    else:
        seen = dense(second, np.tanh(hidden))
    assert observed() == pytest.approx(np.percentile(seen[:, 0], (15, 50, 85)), abs=1e-5)


class Steps(nn.Module):
    """Activations as a function, a method and a module; the last one is at the output."""

    def __init__(self):
        super().__init__()
        self.conv, self.inner = nn.Conv2d(1, 4, 3), nn.Linear(64, 5)
        self.hidden, self.out, self.last = nn.Linear(5, 3), nn.Linear(3, 2), nn.Sigmoid()

    def forward(self, x):
        x = torch.tanh(self.inner(functional.relu(self.conv(x)).flatten(1)))
        return self.last(self.out(self.hidden(x).sigmoid_()))


@pytest.mark.parametrize("where", ["none", "before", "after", "input"])
def test_the_input_of_a_unit_of_a_torch_model(where):
    """In training mode and after a step, against the layer in front, seen by a hook."""
    torch.manual_seed(0)
    model = torch_place(Steps(), where, input_shape=(1, 6, 6), momentum=0.5).train()
    x = torch.randn(40, 1, 6, 6)
    observed = TorchUnitInput(model, x)
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    seen = []
    layer = model.get_submodule("hidden_bn" if where == "before" else "hidden")
    layer.register_forward_hook(lambda module, given, y: seen.append(y.detach()[:, 0].double().numpy()))
    model.eval()(x)
    assert observed() == pytest.approx(np.percentile(seen[0], (15, 50, 85)), abs=1e-6)


def test_a_unit_of_images_is_a_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(8, 1, 6, 6)
    wanted = np.percentile(model[0](x)[:, 0].detach().double().numpy(), (15, 50, 85))
    assert TorchUnitInput(model, x)() == pytest.approx(wanted, abs=1e-6)


def test_a_torch_run_records_it_after_each_epoch(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(40, 1, 6, 6)).astype("float32"), np.arange(40) % 2
    data = Data("images", x, y, x[:10], y[:10], x[:10], y[:10], 2)
    given = settings(tmp_path, advantages=True, framework="torch", engine="torch", device="cpu")
    trainer = TorchTrainer(given, data, TorchArchitecture("steps", Steps, (1, 6, 6), True, ""))
    first, other = (trainer.train(Run(where, 0.1, 0)) for where in ("before", "none"))
    assert (len(first.unit_input), len(other.unit_input)) == (2, 2)
    assert first.unit_input != other.unit_input
    quiet = TorchTrainer(replace(given, advantages=False), data, trainer.architecture).train(Run("none", 0.1, 0))
    assert (quiet.test_loss, quiet.unit_input) == (other.test_loss, []), "looking changes nothing"


def test_a_network_without_hidden_activation_is_not_looked_at():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(3), layers.Dense(2, "softmax")])
    assert UnitInput(model, np.zeros((4, 2), "float32"))() is None
    for plain in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Sigmoid())):
        assert TorchUnitInput(plain, torch.zeros(4, 2))() is None


def test_travel_by_hand():
    assert travel([[-1, 0, 1], [-1, 0, 1]]) == (0, 1)
    assert travel([[0, 0, 0], [-1, 0, 1]]) is None, "a dead unit has no width to measure by"


def test_a_run_starts_from_scaled_kernels(tmp_path):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(40, 2)).astype("float32"), np.arange(40) % 2
    data = Data("points", x, y, x[:10], y[:10], x[:10], y[:10], 2)
    optimizer = {"class_name": "SGD", "config": {}}
    trainer = KerasTrainer(settings(tmp_path, advantages=True), data, Architecture("net", network, optimizer=optimizer))
    plain = [np.array(v) for v in trainer._ready_model(Run("none", 0.1, 0)).variables]
    large = [np.array(v) for v in trainer._ready_model(Run("none", 0.1, 0, 4.0)).variables]
    for one, other in zip(plain, large, strict=True):
        np.testing.assert_array_equal(other, one * 4 if one.ndim > 1 else one)
    assert len(trainer.train(Run("none", 0.1, 0, 4.0)).unit_input) == 2
