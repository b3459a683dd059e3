"""Regression, many labels, other metrics, and data from a function: values by scikit-learn and by hand, and refusals."""

import keras
import numpy as np
import pytest
import sklearn.metrics

from evennorm.errors import ArgumentError, InputError
from evennorm.tools.compare import compare, sources
from evennorm.tools.compare.data import load_data
from evennorm.tools.compare.keras_train import KerasTrainer
from evennorm.tools.compare.measure import Metric, metric_named
from evennorm.tools.compare.metrics import measured_by
from evennorm.tools.compare.models import load_model
from evennorm.tools.compare.racing import race
from evennorm.tools.compare.settings import Run
from evennorm.tools.compare.tasks import judged, task_of
from evennorm.tools.compare.torch_models import load_torch_model
from evennorm.tools.compare.torch_train import TorchTrainer
from evennorm.tools.compare.verdict import verdict
from tests.tools.comparing import importable, record, settings

RNG = np.random.default_rng(3)
SOURCES = """
import numpy as np

def parts(counts, outputs=1):
    random = np.random.default_rng(0)
    x = [random.normal(size=(n, 4)).astype("float32") for n in counts]
    return tuple((each, each[:, :outputs] * 2 + 0.5) for each in x)

def regression():
    return parts((60, 20, 30))

def labels():
    return tuple((x, (y > 0).astype(int)) for x, y in parts((60, 30), 3))

def alone():
    return parts((50,))[0]

def named():
    train, test = parts((60, 30))
    return {"train": train, "test": test}

def datasets():
    import tensorflow as tf
    train, test = ((x, (y[:, 0] > 0).astype(int)) for x, y in parts((60, 30)))
    return tf.data.Dataset.from_tensor_slices(train), tf.data.Dataset.from_tensor_slices(test).batch(7)

def loaders():
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    pairs = ((torch.from_numpy(x), torch.from_numpy(y[:, 0] > 0).long()) for x, y in parts((60, 30)))
    train, test = (TensorDataset(*pair) for pair in pairs)
    return DataLoader(train, batch_size=9, shuffle=True), test

def images():
    random = np.random.default_rng(0)
    return random.random((40, 3, 6, 5)), np.arange(40) % 2

def network(input_shape, classes):
    import torch
    from torch import nn
    return nn.Sequential(nn.Linear(input_shape[0], 8), nn.Tanh(), nn.Linear(8, classes))

def empty():
    return []

def failing():
    raise OSError("no disk")

def odd():
    return {"train": 1, "extra": 2}

def unpaired():
    return [1, 2], [3]
"""


@pytest.fixture(scope="module", autouse=True)
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    (folder / "own_data.py").write_text(SOURCES)
    with importable(folder):
        yield


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (np.arange(50) % 3, "classification"),
        (np.array([0.0, 1.0, 1.0]), "classification"),
        (np.eye(3)[[0, 1, 2, 2]], "classification"),
        (np.array([[1, 0, 1], [0, 0, 0]]), "multilabel"),
        (np.array([[1.0, 2.0], [0.0, 1.0]]), "regression"),
        (np.linspace(0, 1, 9), "regression"),
        (np.arange(100), "regression"),
        (np.array(["a"]), "classification"),
    ],
)
def test_the_task_is_chosen_from_the_labels(labels, task):
    assert task_of(labels) == task


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("mae", Metric("mean_absolute_error", False)),
        ("accuracy", Metric("accuracy")),
        ("R2", Metric("r2_score")),
        ("AUROC", Metric("AUROC")),
        ("binary_crossentropy", Metric("binary_crossentropy", False)),
        ("cost:min", Metric("cost", False)),
        ("cosine_similarity:min", Metric("cosine_similarity", False)),
    ],
)
def test_directions(name, metric):
    assert metric_named(name) == metric


def test_an_unknown_direction_is_asked_for():
    for name in ("cost", "accuracy:up"):
        with pytest.raises(ArgumentError, match=r"^whether .* write (cost|accuracy):max or (cost|accuracy):min"):
            metric_named(name)


Y = RNG.normal(size=(30, 2))
P = Y + RNG.normal(size=(30, 2)) / 3
LABELS = (Y > 0).astype("float32")
SHARES = 1 / (1 + np.exp(-P))
CLASSES = RNG.integers(0, 3, 40)
CHANCES = RNG.dirichlet((1, 1, 1), 40)
SK = sklearn.metrics


@pytest.mark.parametrize(
    ("name", "framework", "task", "y", "p", "wanted"),
    [
        ("mean_absolute_error", "keras", "regression", Y, P, SK.mean_absolute_error(Y, P)),
        ("mean_squared_error", "torch", "regression", Y, P, SK.mean_squared_error(Y, P)),
        ("root_mean_squared_error", "keras", "regression", Y, P, SK.mean_squared_error(Y, P) ** 0.5),
        ("r2_score", "torch", "regression", Y, P, SK.r2_score(Y, P)),
        ("binary_accuracy", "keras", "multilabel", LABELS, SHARES, np.mean((SHARES > 0.5) == LABELS)),
        ("accuracy", "torch", "classification", CLASSES, CHANCES, SK.accuracy_score(CLASSES, CHANCES.argmax(1))),
        ("mean_absolute_percentage_error", "keras", "regression", Y, P, 100 * SK.mean_absolute_percentage_error(Y, P)),
        (
            "sparse_top_k_categorical_accuracy",
            "keras",
            "classification",
            CLASSES,
            CHANCES,
            1.0,  # of three classes, the right one is among the first five
        ),
        (
            "AUROC",
            "torch",
            "classification",
            CLASSES,
            CHANCES,
            SK.roc_auc_score(CLASSES, CHANCES, multi_class="ovr", average="macro"),
        ),
        ("auc", "torch", "multilabel", LABELS, SHARES, SK.roc_auc_score(LABELS, SHARES, average="macro")),
        ("f1_score", "torch", "multilabel", LABELS, SHARES, SK.f1_score(LABELS, SHARES > 0.5, average="micro")),
    ],
)
def test_metrics(name, framework, task, y, p, wanted):
    outputs = p.shape[1]
    assert measured_by(metric_named(name), task, framework, y, outputs)(y, p) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "framework", "text"),
    [
        ("goodness:max", "keras", "one of keras.metrics, such as mean_absolute_error or auc; received 'goodness'"),
        ("goodness:max", "torch", "or a class of torchmetrics, such as AUROC; received 'goodness'"),
        ("sparse_categorical_crossentropy", "keras", "cannot be computed for regression"),
        ("MeanAveragePrecision:max", "torch", "torchmetrics"),
    ],
)
def test_metrics_that_are_none(name, framework, text):
    with pytest.raises((InputError, ImportError), match=text) as caught:
        measured_by(metric_named(name), "regression", framework, Y, 2)
    assert "\n" not in str(caught.value)


def test_what_counts_as_learned():
    def learned(task, y, outputs):
        return judged(task, lambda y, p: float(np.abs(p).mean()), y, outputs, False)

    mean = np.broadcast_to(Y.mean(axis=0), Y.shape)
    assert learned("regression", Y, P).learned
    assert not learned("regression", Y, mean).learned
    assert not learned("regression", Y, mean + RNG.normal(size=Y.shape) / 100).learned
    assert learned("regression", Y, P).loss == pytest.approx(SK.mean_squared_error(Y, P))
    assert learned("multilabel", LABELS, SHARES).learned
    assert learned("multilabel", LABELS, SHARES).loss == pytest.approx(
        np.mean([SK.log_loss(LABELS[:, i], SHARES[:, i]) for i in (0, 1)])
    )
    assert not learned("multilabel", LABELS, np.broadcast_to(LABELS.mean(axis=0), LABELS.shape)).learned
    broken = learned("regression", Y, np.full(Y.shape, np.nan))
    assert broken.loss is None
    assert broken.value == pytest.approx(np.abs(mean).mean())


@pytest.mark.parametrize(
    ("name", "shape", "task", "parts"),
    [
        ("regression", (4,), "regression", (60, 20, 30)),
        ("labels", (4,), "multilabel", (36, 24, 30)),
        ("alone", (4,), "regression", (32, 8, 10)),
        ("named", (4,), "regression", (48, 12, 30)),
        ("datasets", (4,), "classification", (48, 12, 30)),
        ("loaders", (4,), "classification", (48, 12, 30)),
        ("images", (3, 6, 5), "classification", (26, 6, 8)),
    ],
)
def test_data_of_a_function(name, shape, task, parts):
    found = load_data(f"own_data:{name}")
    assert (found.input_shape, found.task) == (shape, task)
    sizes = tuple(map(len, (found.x_train, found.x_validation, found.x_test)))
    assert sizes == parts or name == "labels"
    assert found.digest == load_data(f"own_data:{name}").digest
    if task == "regression":
        np.testing.assert_allclose(found.y_test, found.x_test[:, :1] * 2 + 0.5, rtol=1e-6)
    elif name in ("datasets", "loaders"):
        np.testing.assert_array_equal(found.y_train, found.x_train[:, 0] * 2 + 0.5 > 0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("empty", "returns .train, test. or .train, validation, test.; received 0 parts"),
        ("failing", "calling it fails: OSError: no disk"),
        ("odd", "a mapping has the keys train, validation and test; received train, extra"),
        ("unpaired", "gives pairs of samples and labels; received int"),
        ("absent", "own_data has no function 'absent'"),
    ],
)
def test_data_of_a_function_that_are_none(name, text):
    with pytest.raises(InputError, match=text) as caught:
        load_data(f"own_data:{name}")
    assert "\n" not in str(caught.value)


def test_data_are_read_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(sources, "BOUND", 500)
    for name in ("regression", "loaders"):
        with pytest.raises(InputError, match=r"read into memory, .* at most, and these are more; give fewer"):
            load_data(f"own_data:{name}")


def test_labels_that_do_not_fit_the_task(tmp_path):
    def refusal(task, y):
        path = tmp_path / "data.npz"
        np.savez(path, x=np.ones((len(y), 3)), y=y)
        with pytest.raises(InputError) as caught:
            load_data(str(path), task)
        return str(caught.value)

    assert "multilabel needs rows of 0 and 1; received training labels from 0 to 2" in refusal(
        "multilabel", np.arange(30) % 3
    )
    assert "every training target is the same, 1" in refusal("regression", np.ones(30))
    assert "targets must be finite; that of training sample 1" in refusal("regression", np.array([1, np.inf, 2.0]))
    assert "labels are whole numbers" in refusal("classification", np.linspace(0, 1, 30))


@pytest.mark.parametrize(("task", "name"), [("regression", "regression"), ("multilabel", "labels")])
def test_both_frameworks_learn_it(task, name):
    data = load_data(f"own_data:{name}")
    metric = {"regression": "mean_absolute_error", "multilabel": "binary_accuracy"}[task]
    chosen = settings("out", task=task, metric=metric, epochs=5, batch_size=12, equivalent=0.01)
    run = Run("as-is", {"regression": 0.02, "multilabel": 0.2}[task], 0)
    trained = TorchTrainer(chosen, data, load_torch_model("own_data:network", data)).train(run)
    assert trained.learned
    assert not trained.diverged
    assert trained.test_loss[-1] < trained.test_loss[0]
    built = load_model("paper-mlp", data)
    assert built.build().layers[-1].activation.__name__ == {"regression": "linear", "multilabel": "sigmoid"}[task]
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(data.classes)])
    trainer = KerasTrainer(chosen, data, built)
    trainer._compile(model)
    model.fit(data.x_train, data.y_train, verbose=0, epochs=1)
    found = trainer.judge(model, data.x_test, data.y_test)
    p = model.predict(data.x_test, verbose=0)
    if task == "regression":
        assert found.value == pytest.approx(SK.mean_absolute_error(data.y_test, p), rel=1e-5)
    else:
        assert found.value == pytest.approx(np.mean((p > 0) == data.y_test))


def test_a_margin_in_the_unit_of_an_error():
    chosen = {"task": "regression", "metric": "mean_absolute_error"}
    assert settings("out", **chosen, equivalent=3.0).equivalent == 3
    with pytest.raises(ArgumentError, match=r"a difference that counts as none is 0 or more and finite; received -1$"):
        settings("out", **chosen, equivalent=-1.0)


def errors(*values):
    return [record(test=value, validation=value) for value in values]


def test_lower_is_better_in_race_and_verdict():
    chosen = settings(
        "out", task="regression", metric="mean_absolute_error", repeats=3, equivalent=0.0, learning_rates=(0.1, 0.2)
    )
    cells = {
        ("none", 0.1): errors(5.0, 5.1, 5.2),
        ("none", 0.2): errors(7.0, 7.0, 7.0),
        ("before", 0.1): errors(9.0, 9.0, 9.0),
        ("before", 0.2): errors(2.0, 2.1, 2.3),
    }
    records = {Run(*cell, i): each for cell, found in cells.items() for i, each in enumerate(found)}
    state = race(chosen, records, chosen.measure.step(100))
    assert state.chosen == {"none": 0.1, "before": 0.2}
    [pair] = state.differences
    assert (pair.better, round(pair.difference, 2), pair.shown) == ("before", 2.97, True)
    text = verdict(chosen, records, state)
    assert text.startswith("before below none by 2.97 (")
    assert "points" not in text
    assert "Best is before, below none in mean absolute error." in text


def test_a_whole_comparison_by_an_error(tmp_path):
    found = compare(
        "own_data:regression",
        "own_data:network",
        ["none", "before"],
        2,
        [0.05],
        2,
        12,
        out=str(tmp_path),
        metric="rmse",
    )
    assert (found.settings.task, found.settings.metric) == ("regression", "root_mean_squared_error")
    assert "task regression, chosen from the labels" in found.data
    header = (tmp_path / "runs.csv").read_text().splitlines()[0]
    assert "test_root_mean_squared_error" in header
    assert "test_root_mean_squared_error" in found.as_dict()["table"][0]
    assert (tmp_path / "curves.png").stat().st_size > 0
