"""The built-in networks, model files and functions; one training beside the same training written in plain Keras."""

import keras
import numpy as np
import pytest

import evennorm.keras
from evennorm.errors import ArgumentError, InputError
from evennorm.tools.compare.data import Data
from evennorm.tools.compare.keras_train import KerasTrainer
from evennorm.tools.compare.models import ends_in_logits, load_model
from evennorm.tools.compare.networks import article_cnn, paper_mlp, width_share
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.tasks import chance
from evennorm.tools.compare.train import seed_of

L = keras.layers


def data(shape=(8, 8, 1), classes=3, count=40):
    """Samples whose class shows in their mean, with some noise."""
    random = np.random.default_rng(0)

    def part(size):
        y = np.arange(size) % classes
        return (y.reshape(-1, *[1] * len(shape)) / classes + random.random((size, *shape)) / 2).astype("float32"), y

    return Data("made", *part(count), *part(count // 4), *part(count // 2), classes=classes)


def settings(**changes):
    values = {
        "data": "made",
        "model": "paper-mlp",
        "placements": ("none", "before"),
        "repeats": 2,
        "learning_rates": (0.1,),
        "epochs": 2,
        "batch_size": 8,
        "engine": keras.config.backend(),
        "seed": 0,
        "out": "results",
    }
    return Settings(**values | changes)


def layers_of(model):
    return [(type(layer).__name__, layer.get_config()) for layer in model.layers]


def refusal(model, samples=None):
    with pytest.raises(InputError) as caught:
        load_model(model, samples or data())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_article_cnn_is_the_articles_network():
    model = article_cnn((48, 48, 1), 7)
    written = [
        *("Conv2D 32", "Conv2D 64", "BatchNormalization", "MaxPooling2D", "Dropout 0.25"),
        *("Conv2D 128", "MaxPooling2D", "BatchNormalization", "Conv2D 128", "MaxPooling2D", "Dropout 0.25"),
        *("Flatten", "BatchNormalization", "Dense 1024", "Dropout 0.5", "Dense 7"),
    ]
    found = []
    for kind, config in layers_of(model):
        detail = next((str(config[key]) for key in ("filters", "units", "rate") if key in config), "")
        found.append(f"{kind} {detail}".strip())
    assert found == written
    # Kernels and biases, and four values per channel of 64, 128 and 4 x 4 x 128.
    convolutions = 9 * 1 * 32 + 32 + 9 * 32 * 64 + 64 + 9 * 64 * 128 + 128 + 9 * 128 * 128 + 128
    dense = 2048 * 1024 + 1024 + 1024 * 7 + 7
    assert model.count_params() == convolutions + dense + 4 * (64 + 128 + 2048)
    assert {config["activation"] for kind, config in layers_of(model) if kind == "Conv2D"} == {"relu"}
    assert {config["padding"] for kind, config in layers_of(model) if kind == "Conv2D"} == {"valid"}
    assert all(
        isinstance(layer, evennorm.keras.BatchNormalization) for layer in model.layers if "Norm" in type(layer).__name__
    )


@pytest.mark.parametrize(("side", "share"), [(1, 0.25), (16, 0.25), (17, 0.5), (33, 0.5), (34, 1), (500, 1)])
def test_the_width_of_article_cnn_follows_the_images(side, share):
    assert width_share(side) == share


def test_article_cnn_takes_images_too_small_to_pool():
    model = article_cnn((3, 5, 3), 10)
    assert (model.layers[0].filters, model.layers[-3].units) == (8, 256)
    assert [type(layer).__name__ for layer in model.layers].count("MaxPooling2D") == 1
    assert model.output_shape == (None, 10)


def test_article_cnn_takes_images_only():
    with pytest.raises(InputError, match=r"received samples of shape \(20,\); use --model paper-mlp"):
        article_cnn((20,), 3)


def test_paper_mlp_is_the_network_of_figure_1():
    kinds = [(kind, config.get("units"), config.get("activation")) for kind, config in layers_of(paper_mlp((28, 28, 1), 10))]
    assert kinds == [("Flatten", None, None), *[("Dense", 100, "sigmoid")] * 3, ("Dense", 10, "softmax")]
    weights = paper_mlp((28, 28, 1), 10).get_weights()[0]
    assert (weights.mean(), weights.std()) == (pytest.approx(0, abs=0.002), pytest.approx(0.1, rel=0.02))


@pytest.mark.parametrize("name", ["article-cnn", "paper-mlp"])
def test_built_in_networks_have_every_placement(name):
    architecture = load_model(name, data())
    counts = {
        where: sum("BatchNorm" in type(layer).__name__ for layer in architecture.place(where).layers)
        for where in ("none", "before", "after", "input", "as-is")
    }
    hidden = 5 if name == "article-cnn" else 3
    assert counts == {"none": 0, "before": hidden, "after": hidden, "input": 1, "as-is": 3 if name == "article-cnn" else 0}


def test_placements_start_from_the_same_weights(functions):
    architecture = load_model(f"{functions}:with_dropout", data())
    kernels = {}
    for where in ("none", "before", "after", "input", "as-is"):
        keras.utils.set_random_seed(7)
        weights = architecture.place(where).weights
        kernels[where] = [keras.ops.convert_to_numpy(weight) for weight in weights if weight.name == "kernel"]
    for where, found in kernels.items():
        assert len(found) == 2
        for kernel, other in zip(found, kernels["none"], strict=True):
            assert np.array_equal(kernel, other), where


def test_a_model_file_gives_its_architecture_with_fresh_weights(tmp_path):
    path = str(tmp_path / "model.keras")
    model = paper_mlp((8, 8, 1), 3)
    model.compile(keras.optimizers.Adam(0.123, beta_1=0.8))
    model.save(path)
    architecture = load_model(path, data())
    keras.utils.set_random_seed(1)
    first = architecture.build().get_weights()[0]
    second = architecture.build().get_weights()[0]
    keras.utils.set_random_seed(1)
    again = architecture.build().get_weights()[0]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, model.get_weights()[0])
    assert architecture.digest == load_model(path, data()).digest
    assert architecture.optimizer["class_name"] == "Adam"
    assert architecture.optimizer["config"]["beta_1"] == 0.8
    assert "learning_rate" not in architecture.optimizer["config"]


def test_model_files_that_cannot_be_used(tmp_path):
    missing, broken, wrong = (str(tmp_path / name) for name in ("missing.keras", "broken.keras", "wrong.keras"))
    assert f"there is no model file {missing}" in refusal(missing)
    (tmp_path / "broken.keras").write_bytes(b"PK nothing")
    assert f"{broken} is damaged or cut short" in refusal(broken)
    paper_mlp((8, 8, 1), 4).save(wrong)
    assert "outputs of shape (None, 4); made has 3 classes, which needs (None, 3)" in refusal(wrong)
    paper_mlp((8, 9, 1), 3).save(wrong)
    assert "takes inputs of shape (None, 8, 9, 1); made has samples of shape (8, 8, 1)" in refusal(wrong)


def test_a_model_file_never_executes_code(tmp_path):
    path = str(tmp_path / "lambda.keras")
    keras.Sequential([keras.Input((8, 8, 1)), L.Flatten(), L.Lambda(lambda x: x), L.Dense(3)]).save(path)
    assert "lambda.keras cannot be loaded as a Keras model" in refusal(path)


FUNCTIONS = """
import keras
from keras import layers as L

def both(input_shape, classes, width=5):
    return keras.Sequential([keras.Input(input_shape), L.Flatten(), L.Dense(width, activation="relu"), L.Dense(classes)])

def neither():
    return both((8, 8, 1), 3)

def everything(**options):
    return both(options["input_shape"], options["classes"])

def unbuilt(classes):
    return keras.Sequential([L.Flatten(), L.Dense(4, activation="tanh"), L.Dense(classes, activation="softmax")])

def with_dropout(input_shape, classes):
    hidden = [L.Dense(8, activation="relu"), L.Dropout(0.5)]
    return keras.Sequential([keras.Input(input_shape), L.Flatten(), *hidden, L.Dense(classes, activation="softmax")])

def linear(input_shape, classes):
    return keras.Sequential([keras.Input(input_shape), L.Flatten(), L.Dense(classes)])

def demanding(input_shape, depth):
    return both(input_shape, 3)

def failing():
    raise RuntimeError("no\\nluck")

def number():
    return 5
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "functions_of_users.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "functions_of_users"


def test_functions_are_called_with_what_they_ask_for(functions):
    for name in ("both", "neither", "everything", "unbuilt"):
        architecture = load_model(f"{functions}:{name}", data())
        assert architecture.build().output_shape == (None, 3)
        assert ends_in_logits(architecture.build()) == (name != "unbuilt")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("demanding", "depth needs a default"),
        ("failing", "calling it fails: RuntimeError: no"),
        ("number", "torch.nn.Module, and say so by its return annotation); received int"),
        ("nowhere", "functions_of_users has no function 'nowhere'"),
    ],
)
def test_functions_that_cannot_be_used(functions, name, words):
    assert words in refusal(f"{functions}:{name}")


def test_what_is_no_model_at_all():
    assert "no module 'nowhere'" in refusal("nowhere:model")
    assert "received 'nonsense', which is none of these" in refusal("nonsense")


def test_a_placement_that_a_model_has_no_place_for(functions):
    architecture = load_model(f"{functions}:both", data())
    assert architecture.place("before").count_params() > architecture.place("none").count_params()
    with pytest.raises(InputError, match="functions_of_users:linear has no placement 'before'"):
        load_model(f"{functions}:linear", data()).place("before")


def test_a_run_is_what_plain_keras_computes(functions):
    """Weights, order, dropout, optimizer and measures, on a model that was trained at another rate and seed before."""
    samples = data()
    architecture = load_model(f"{functions}:with_dropout", samples)
    trainer = KerasTrainer(settings(), samples, architecture)
    trainer.train(Run("before", 0.2, 0))
    record = trainer.train(Run("before", 0.05, 1))

    seed = seed_of(0, 1)
    keras.utils.set_random_seed(seed)
    model = evennorm.keras.place(architecture.build(), "before", momentum=0.9)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "sparse_categorical_crossentropy", metrics=["accuracy"])
    random = np.random.default_rng(seed)
    for epoch in range(2):
        order = random.permutation(40)
        model.fit(samples.x_train[order], samples.y_train[order], batch_size=8, shuffle=False, verbose=0)
        loss, accuracy = model.evaluate(samples.x_test, samples.y_test, batch_size=20, verbose=0)
        assert record.test_accuracy[epoch] == pytest.approx(accuracy, abs=1e-6)
        assert record.test_loss[epoch] == pytest.approx(loss, rel=1e-6)
        loss, accuracy = model.evaluate(samples.x_train[:20], samples.y_train[:20], batch_size=20, verbose=0)
        assert record.train_accuracy[epoch] == pytest.approx(accuracy, abs=1e-6)
        assert record.train_loss[epoch] == pytest.approx(loss, rel=1e-6)


def test_an_epoch_is_whole_batches(monkeypatch):
    samples = data(count=43)
    seen = []
    fit = keras.Model.fit
    monkeypatch.setattr(keras.Model, "fit", lambda self, x, y, **kw: seen.append(len(x)) or fit(self, x, y, **kw))
    KerasTrainer(settings(), samples, load_model("paper-mlp", samples)).train(Run("none", 0.1, 0))
    assert seen == [40, 40]


def test_a_run_whose_loss_explodes_stops_and_is_counted():
    samples = data()
    record = KerasTrainer(settings(), samples, load_model("paper-mlp", samples)).train(Run("none", 1e38, 0))
    assert (record.learned, record.diverged) == (False, True)
    assert len(record.test_accuracy) == 1
    assert record.train_loss == [None]


def test_a_run_ends_where_its_validation_loss_is_flat(monkeypatch):
    """It is asked after each epoch, with the losses so far; the epochs of the settings are the budget."""
    samples, asked = data(), []

    def flat(losses, learned, budget):
        asked.append((len(losses), budget))
        return len(losses) == 2

    monkeypatch.setattr("evennorm.tools.compare.train.is_flat", flat)
    trainer = KerasTrainer(settings(epochs=5, until_flat=True), samples, load_model("paper-mlp", samples))
    record = trainer.train(Run("none", 0.1, 0))
    assert asked == [(1, 5), (2, 5)]
    assert len(record.test_accuracy) == len(record.validation_loss) == 2
    model, _ = trainer._compiled["none"]
    loss = model.evaluate(trainer.data.x_validation, samples.y_validation, verbose=0)[0]
    assert record.validation_loss[-1] == pytest.approx(loss, rel=1e-6)


def test_a_run_no_better_than_guessing_has_not_learned():
    samples = data()
    trainer = KerasTrainer(settings(), samples, load_model("paper-mlp", samples))
    record = trainer.train(Run("none", 1e-9, 0))
    assert (record.learned, record.diverged) == (False, False)
    # 50 of 100 guessed right, with a standard error of 5.
    assert chance(np.array([0, 1] * 50)) == pytest.approx(0.6)


def test_a_batch_larger_than_the_data():
    samples = data()
    with pytest.raises(ArgumentError, match="received a batch size of 64 for 40 samples"):
        KerasTrainer(settings(batch_size=64), samples, load_model("paper-mlp", samples))
