"""The model that `evennorm compare` hands over: which one, trained on what, what is told of it, and that it is made once."""

import json
import os
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from scipy.stats import binom, t

from evennorm.tools.compare.best import choose, together
from evennorm.tools.compare.data import load_data
from evennorm.tools.compare.intervals import bootstrap_interval, share_interval
from evennorm.tools.compare.keras_train import KerasTrainer
from evennorm.tools.compare.racing import race
from evennorm.tools.compare.settings import Run
from tests.tools.comparing import ENGINE, SOURCES, TINY, command, importable, record, settings


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def made(given, accuracies):
    """Records of a study: of each placement (test, validation) in every repeat."""
    return {run: record(*accuracies[run.placement]) for run in given.runs}


def test_the_choice_is_that_of_validation(tmp_path):
    """The placement that is better on the test samples is not the one, since its accuracy there is reported."""
    given = settings(tmp_path, repeats=3)
    records = made(given, {"none": (0.9, 0.6), "before": (0.6, 0.7)})
    chosen = choose(given, records, race(given, records, 0.001))
    assert (chosen.placement, chosen.learning_rate, chosen.epochs) == ("before", 0.1, 2)
    assert chosen.validation_accuracy == pytest.approx(0.7)
    assert chosen.why.endswith("though another placement is above it on the test samples")
    both = made(given, {"none": (0.6, 0.6), "before": (0.9, 0.7)})
    assert choose(given, both, race(given, both, 0.001)).why.endswith("as the test samples have it too")
    even = made(given, {"none": (0.7, 0.7), "before": (0.7, 0.7)})
    chosen = choose(given, even, race(given, even, 0.01))
    assert chosen.placement == "none"
    assert chosen.why.endswith("could not be shown")


def test_the_epochs_are_those_of_the_repeats_that_learned(tmp_path):
    given = settings(tmp_path, repeats=3, epochs=9, until_flat=True)
    records = made(given, {"none": (0.2, 0.2), "before": (0.9, 0.9)})
    for repeat, epochs in enumerate((4, 6, 1)):
        values = record(0.9, 0.9, seconds=[1.0] * epochs, learned=epochs > 1)
        records[Run("before", 0.1, repeat)] = values
    assert choose(given, records, race(given, records, 0.001)).epochs == 5


def test_where_no_run_learned_there_is_no_model(tmp_path):
    given = settings(tmp_path)
    records = {run: record(learned=False) for run in given.runs}
    assert choose(given, records, race(given, records, 0.001)) is None


def test_the_interval_is_that_of_clopper_and_pearson():
    low, high = share_interval(18, 20)
    assert binom.sf(17, 20, low) == pytest.approx(0.025)
    assert binom.cdf(18, 20, high) == pytest.approx(0.025)
    assert share_interval(20, 20)[1] == 1


def test_where_lower_is_better_the_lowest_error_is_chosen(tmp_path):
    given = settings(tmp_path, repeats=3, task="regression", metric="mean_absolute_error")
    records = made(given, {"none": (0.9, 3e-12), "before": (0.6, 2e-12)})
    chosen = choose(given, records, race(given, records, 0.0))
    assert chosen.placement == "before"
    assert chosen.why == "by the mean validation mean absolute error of its repeats, as the test samples have it too"


def test_the_bootstrap_is_near_students_interval_for_a_mean():
    errors = np.random.default_rng(1).exponential(size=200)
    low, high = bootstrap_interval(lambda chosen: errors[chosen].mean(), 200, seed=3)
    half = t.ppf(0.975, 199) * errors.std(ddof=1) / 200**0.5
    assert (low, high) == pytest.approx((errors.mean() - half, errors.mean() + half), abs=0.2 * half)
    assert (low, high) == bootstrap_interval(lambda chosen: errors[chosen].mean(), 200, seed=3)
    holes = bootstrap_interval(lambda chosen: float("nan") if 0 in chosen else errors[chosen].mean(), 200, seed=3)
    assert all(np.isfinite(holes))


def test_a_model_of_errors_is_handed_over_with_an_interval(tmp_path):
    """The error is that of the file, by hand in float64, and the interval surrounds it."""
    random = np.random.default_rng(0)
    x = random.normal(size=(90, 2)).astype("float32")
    path = tmp_path / "lines.npz"
    np.savez(path, x_train=x[:60], y_train=x[:60, :1] * 2 + 0.5, x_test=x[60:], y_test=x[60:, :1] * 2 + 0.5)
    (tmp_path / "linear_network.py").write_text(TINY.replace('"softmax"', '"linear"'))
    out = tmp_path / "results"
    changes = {"model": "linear_network:network", "placements": "none", "learning_rates": "0.05", "repeats": 1}
    with importable(tmp_path):
        result = command(path, out, **changes)
    assert result.exit_code == 0, result.output
    model = summary_of(out)["model"]
    predicted = keras.saving.load_model(out / "best.keras").predict(x[60:], verbose=0).astype("float64")
    errors = np.abs(predicted - (x[60:, :1] * 2 + 0.5)).mean(axis=1)
    assert model["test_accuracy"] == pytest.approx(errors.mean(), rel=1e-5)
    half = t.ppf(0.975, 29) * errors.std(ddof=1) / 30**0.5
    assert (model["low"], model["high"]) == pytest.approx((errors.mean() - half, errors.mean() + half), abs=0.4 * half)
    assert (model["metric"], model["interval"]) == ("mean_absolute_error", "percentile bootstrap over test samples")
    last = result.stdout.splitlines()[-1]
    assert f"mean absolute error {errors.mean():.3g} (" in last
    assert last.endswith("on 30 test samples")
    assert '<th scope="row">test mean absolute error</th>' in (out / "report.html").read_text()


def test_the_model_stands_in_the_summary_and_in_the_last_lines(finished):
    out, result = finished
    model = summary_of(out)["model"]
    assert model["files"] == ["best.keras"]
    assert summary_of(out)["files"]["best.keras"] == str(out / "best.keras")
    assert (model["samples"], model["test_samples"]) == (100, 20)
    best = max((row for row in summary_of(out)["table"] if row["chosen"]), key=lambda row: row["test_accuracy"])
    assert model["placement"] in ("none", "before")
    assert best["learning_rate"] in (0.1, 0.5)
    *check, why, place = result.stdout.splitlines()[-2 - max(1, len(model["findings"])) :]
    assert place.startswith(f"The model is in {out / 'best.keras'}: {model['placement']} at learning rate ")
    assert f"{100 * model['test_accuracy']:.1f} % of 20 test samples right ({100 * model['low']:.1f} to " in place
    assert why.startswith("It was chosen by the mean validation accuracy of its repeats")
    assert all(line.startswith("evennorm check: ") for line in check)


def test_a_fresh_process_gets_the_accuracy_that_is_told(finished, data):
    """Plain Keras and `import evennorm.keras` are enough."""
    out, _ = finished
    program = f"""
import keras, numpy, evennorm.keras
with numpy.load({data!r}) as file:
    x, y = file["x_test"], file["y_test"]
model = keras.saving.load_model({str(out / "best.keras")!r})
print(int((model.predict(x, verbose=0).argmax(axis=1) == y).sum()))
"""
    environment = os.environ | {"KERAS_BACKEND": ENGINE, "PYTHONPATH": SOURCES}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout.split()[-1]) / 20 == summary_of(out)["model"]["test_accuracy"]


def test_it_is_trained_as_a_run_on_training_and_validation_samples(finished, data):
    """The weights are those of an ordinary run on both parts together, from the seed of repeat 0."""
    out, _ = finished
    model = summary_of(out)["model"]
    from evennorm.tools.compare.models import load_model

    parts = load_data(data)
    joined = together(parts)
    assert sorted(map(tuple, joined.x_train)) == sorted(map(tuple, np.concatenate([parts.x_train, parts.x_validation])))
    given = settings(out, epochs=model["epochs"], learning_rates=(model["learning_rate"],))
    trainer = KerasTrainer(given, joined, load_model("tiny_network:network", joined))
    trained, _ = trainer.trained(Run(model["placement"], model["learning_rate"], model["seed_of_repeat"]))
    saved = keras.saving.load_model(out / "best.keras")
    for mine, theirs in zip(trained.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_it_is_made_once(finished, data):
    """The file says what it was made from; only that of another study, or a damaged one, is made anew."""
    out, _ = finished
    path = out / "best.keras"
    before = path.read_bytes()
    assert command(data, out).exit_code == 0
    assert path.read_bytes() == before
    path.write_bytes(before[: len(before) // 2])
    assert command(data, out, "--force").exit_code == 0
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert (
            json.loads(archive.read("evennorm.json"))["model"]["test_accuracy"] == summary_of(out)["model"]["test_accuracy"]
        )
    assert [each.name for each in out.iterdir() if ".part" in each.name] == []


def test_no_model(data, tmp_path):
    result = command(data, tmp_path, "--no-model", placements="none", repeats=1, learning_rates="0.5")
    assert result.exit_code == 0
    assert not (tmp_path / "best.keras").exists()
    assert summary_of(tmp_path)["model"] is None
    assert "The model is in" not in result.stdout


def test_a_file_that_is_no_model_is_not_overwritten(data, tmp_path):
    (tmp_path / "best.keras").write_text("mine")
    result = command(data, tmp_path, placements="none", repeats=1, learning_rates="0.5")
    assert result.exit_code == 2
    assert "best.keras' exists and is no Keras model" in result.stderr
    assert (tmp_path / "best.keras").read_text() == "mine"
