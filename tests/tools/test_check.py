"""`evennorm check` on models: what it measures on data, and its answers as text, JSON, SARIF and a page."""

from __future__ import annotations

import json
import re
import xml.dom.minidom
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from keras import layers
from torch import nn

import evennorm
from evennorm.cli import main
from evennorm.errors import ArgumentError, InputError
from evennorm.keras import BatchNormalization
from evennorm.tools.check import Finding, Report, check
from evennorm.tools.check.github import workflow_commands
from evennorm.tools.check.manual import manual
from evennorm.tools.check.page import page
from evennorm.tools.check.picture import Panel, Scale
from evennorm.tools.check.rule import Rule
from evennorm.tools.check.rules import RULES
from evennorm.tools.check.sarif import sarif

MEAN, SCALE = 3.0, 2.0


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


def data(samples: int = 96) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    return random.normal(MEAN, SCALE, (samples, 6)).astype("float32"), random.integers(0, 3, samples)


def keras_model(**norm: object) -> keras.Model:
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(5, name="dense"), layers.BatchNormalization(name="bn", **norm), layers.ReLU(name="relu")]
    return keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(3, name="out")], name="net")


def torch_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


# Measurements


def test_drift_and_outputs_are_those_of_float64() -> None:
    """The layer's input, its statistics over all samples, and both outputs, worked out in NumPy."""
    model = keras_model(epsilon=1e-3)
    x, _ = data()
    kernel, bias = (np.float64(w) for w in model.get_layer("dense").get_weights())
    gamma, beta = np.linspace(0.5, 1.5, 5), np.linspace(-1, 1, 5)
    moving_mean, moving_variance = np.linspace(0, 2, 5), np.linspace(1, 3, 5)
    model.get_layer("bn").set_weights([gamma, beta, moving_mean, moving_variance])
    last, last_bias = (np.float64(w) for w in model.get_layer("out").get_weights())
    batches = [(x[:32], None), (x[32:64], None), (x[64:], None)]
    measured = check(model, batches).measurements

    z = np.float64(x) @ kernel + bias
    layer = measured.of("bn")
    assert layer.count == 96
    np.testing.assert_allclose(layer.batch_mean, z.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.batch_variance, z.var(0), rtol=1e-5)
    drifts = np.abs(z.mean(0) - moving_mean) / np.sqrt(moving_variance + 1e-3)
    np.testing.assert_allclose(layer.drifts, drifts, rtol=1e-5)
    assert layer.drift == pytest.approx(np.sqrt(np.mean(drifts**2)), rel=1e-5)
    assert layer.worst == np.argmax(drifts)
    ratio = np.median((z.var(0) + 1e-3) / (moving_variance + 1e-3))
    assert layer.variance_ratio == pytest.approx(ratio, rel=1e-5)

    def outputs(part, mean, variance):
        normalized = gamma * (part - mean) / np.sqrt(variance + 1e-3) + beta
        return np.maximum(normalized, 0) @ last + last_bias

    inference = outputs(z, moving_mean, moving_variance)
    training = np.concatenate([outputs(part, part.mean(0), part.var(0)) for part in np.split(z, 3)])
    expected = np.sqrt(np.sum((inference - training) ** 2) / np.sum((training - training.mean(0)) ** 2))
    assert measured.output_difference == pytest.approx(expected, rel=1e-4)
    assert (measured.samples, measured.batch_size) == (96, 32)


@pytest.mark.parametrize("make", [keras_model, torch_model])
def test_accuracies(make) -> None:
    """Labels are what the model answers in inference, so that this accuracy is 1 and the other one not."""
    model = make()
    x, _ = data()
    if isinstance(model, keras.Model):
        answers = model.predict(x, verbose=0)
    else:
        answers = model.eval()(torch.from_numpy(x)).detach().numpy()
    report = check(model, [(x, answers.argmax(1))])
    assert report.measurements.inference_accuracy == 1
    assert report.measurements.training_accuracy < 1


@pytest.mark.parametrize("make", [keras_model, torch_model])
def test_the_model_is_left_as_it_was(make) -> None:
    model = make()
    weights = model.get_weights() if isinstance(model, keras.Model) else list(model.state_dict().values())
    before = [np.array(w) for w in weights]
    check(model, [(data()[0], None)])
    weights = model.get_weights() if isinstance(model, keras.Model) else list(model.state_dict().values())
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, weights, strict=True))
    assert getattr(model, "training", True)


def test_a_layer_shared_by_two_inputs_is_measured_at_each_call() -> None:
    norm, a, b = layers.BatchNormalization(name="bn"), keras.Input((4,)), keras.Input((4,))
    model = keras.Model([a, b], layers.Dense(2)(layers.Add()([norm(a), norm(b)])))
    random = np.random.default_rng(0)
    near = tuple(random.normal(m, 1, (2000, 4)).astype("float32") for m in (0, 0.1))
    far = tuple(random.normal(m, 1, (2000, 4)).astype("float32") for m in (0, 5))
    assert "BN502" not in {f.code for f in check(model, [(near, None)]).findings}
    finding = next(f for f in check(model, [(far, None)]).findings if f.code == "BN502")
    distance = float(re.search(r"up to (\S+) standard", finding.what).group(1))
    assert distance == pytest.approx(5, rel=0.05)


def test_frozen_layers_keep_to_their_statistics() -> None:
    model = keras_model()
    model.trainable = False
    report = check(model, [(data()[0], None)])
    assert report.measurements.output_difference == 0


def test_data_that_the_model_does_not_take() -> None:
    with pytest.raises(InputError, match=r"received \(4, 7\), of which it says"):
        check(torch_model(), [(np.zeros((4, 7), "float32"), None)])
    with pytest.raises(InputError, match="no batch"):
        check(torch_model(), [])


# torch


def test_torch_shapes_come_from_data_or_are_given() -> None:
    class Sequence(nn.Module):
        """Channels-last steps, normalized along axis 1 as torch does."""

        def __init__(self):
            super().__init__()
            self.linear, self.bn, self.out = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(7), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(torch.relu(self.bn(self.linear(x))))

    assert [f.code for f in check(Sequence()).findings] == []
    (finding,) = check(Sequence(), shape=(8, 7, 3), batch_size=8).findings
    assert finding.code == "BN101"
    assert "transpose" in finding.remedy


def test_torch_weight_decay() -> None:
    model = torch_model()
    decayed = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    assert [f.what for f in check(model, optimizer=decayed, select=["BN501"]).findings] == [
        "weight decay acts on its gamma and beta"
    ]
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not check(model, optimizer=plain, select=["BN501"]).findings


def test_torch_layers_that_count_their_batches() -> None:
    model = torch_model()
    for _ in range(20):
        model(torch.from_numpy(data()[0]))
    (finding,) = check(model, select=["BN302"]).findings
    assert f"{100 * 0.9**20:.2g} %" in finding.what
    for _ in range(30):
        model(torch.from_numpy(data()[0]))
    assert not check(model, select=["BN302"]).findings


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its data."""
    folder = tmp_path_factory.mktemp("check")
    keras_model(momentum=0.1).save(folder / "net.keras")
    x, y = data()
    np.savez(folder / "data.npz", x=x, y=y)
    return folder


def test_text(files: Path) -> None:
    result = run(files / "net.keras")
    assert result.exit_code == 1
    assert result.output.startswith("net: 1 batch normalization\n")
    assert "BN201 note: A bias straight before batch normalization (bias-before-norm)" in result.output
    assert "    dense: it adds a bias that bn subtracts again\n" in result.output
    assert "1 warning, 1 note; --fix takes care of 1" in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines() if not line.startswith("BN"))


def test_clean(files: Path) -> None:
    result = run(files / "net.keras", "--ignore", "BN201,momentum-convention")
    assert (result.exit_code, result.output) == (0, "net: 1 batch normalization\n\nNothing looks wrong.\n")


def test_json(files: Path) -> None:
    result = run(files / "net.keras", "--data", files / "data.npz", "--batch-size", 48, "--json", "--select", "BN2,BN6")
    answer = json.loads(result.output)
    assert result.exit_code == 1
    assert (answer["model"], answer["framework"], answer["layers"]) == ("net", "keras", 1)
    assert answer["findings"][0] == {
        "code": "BN201",
        "name": "bias-before-norm",
        "level": "note",
        "layer": "dense",
        "what": "it adds a bias that bn subtracts again",
        "why": answer["findings"][0]["why"],
        "remedy": "build it with use_bias=False, or let --fix drop it",
        "fixable": True,
    }
    assert answer["measurements"]["samples"] == 96
    assert answer["measurements"]["batch_size"] == 48


def test_sarif_has_what_its_schema_requires(files: Path) -> None:
    log = json.loads(run(files / "net.keras", "--sarif").output)
    assert log["version"] == "2.1.0"
    (only,) = log["runs"]
    rules = only["tool"]["driver"]["rules"]
    assert only["tool"]["driver"]["name"] == "evennorm"
    assert len({rule["id"] for rule in rules}) == len(rules)
    for result in only["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        (location,) = result["locations"]
        assert location["logicalLocations"][0]["fullyQualifiedName"] in ("dense", "bn")
        assert location["physicalLocation"]["artifactLocation"]["uri"].startswith("file:///")
    assert [result["ruleId"] for result in only["results"]] == ["BN201", "BN303"]


def test_sarif_tells_what_was_not_read() -> None:
    class Odd(keras.Model):
        def __init__(self):
            super().__init__(name="odd")
            self.bn = layers.BatchNormalization(name="bn")

    (only,) = sarif(check(Odd()))["runs"]
    (notification,) = only["invocations"][0]["toolExecutionNotifications"]
    assert only["invocations"][0]["executionSuccessful"] is True
    assert "no input shape yet" in notification["message"]["text"]


def test_the_page_asks_for_nothing_else_and_escapes_names(files: Path, tmp_path: Path) -> None:
    hostile = "<script>alert(1)<script>"
    inputs = keras.Input((6,))
    norm = layers.BatchNormalization(name="bn")
    model = keras.Model(inputs, layers.Dense(3)(norm(layers.Dense(5, name=hostile)(inputs))), name="<b>net")
    text = page(check(model, [(data()[0], None)]))
    assert "<b>net" not in text
    assert "<script" not in text
    assert not re.search(r"""src\s*=|href="[^#]|url\(|@import|https?://""", text)
    HTMLParser().feed(text)
    figures = [xml.dom.minidom.parseString(figure) for figure in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    titles = [figure.getElementsByTagName("text")[0].firstChild.data for figure in figures]
    assert titles == ["gamma", "beta", "moving mean", "moving variance", "drift"]
    for figure in figures:
        assert [p.getAttribute("class") for p in figure.getElementsByTagName("path")].count("curve") == 1

    written = tmp_path / "report.html"
    result = run(files / "net.keras", "--html", written)
    assert f"Page: {written}" in result.output
    assert written.read_text().startswith("<!DOCTYPE html>")


def test_the_page_begins_with_what_was_found_and_links_to_it(files: Path) -> None:
    text = page(check(files / "net.keras"), "models/net.keras")
    assert "<p><b>1 warning, 1 note</b></p>" in text
    assert "<th>model</th><td>models/net.keras</td>" in text
    for code, level in (("BN201", "note"), ("BN303", "warning")):
        assert text.count(f'href="#{code}-{level}"') >= 1
        assert f'<h3 id="{code}-{level}"><span class="level {level}">{level}</span> {code} ' in text
    assert f"evennorm {evennorm.__version__}, {datetime.now(UTC):%Y-%m-%d}" in text
    assert text.count("as in a new layer") == 4  # it has never been trained
    assert "`" not in text


def test_panels_of_one_kind_have_one_scale() -> None:
    small, large = (Panel("gamma", np.array(values), 1.0) for values in ([0.5, 1.5], [1.0, 3.0, np.inf]))
    scale = Scale.over([small, large])
    assert scale == Scale(0.5, 3.0)
    assert [scale.at(value) for value in (0.5, 1.75, 3.0)] == [0, 0.5, 1]
    decades = Scale.over([Panel("variance", np.array([1e-2, 1e4]), 1.0)])
    assert decades == Scale(1e-2, 1e4, logarithmic=True)
    assert [decades.at(value) for value in (1e-2, 10, 1e4)] == pytest.approx([0, 0.5, 1])
    flat = Scale.over([Panel("gamma", np.ones(3), 1.0)])
    assert flat.at(1.0) == 0.5
    assert Scale.over([Panel("gamma", np.array([np.nan]), None)]) is None


def test_annotations_for_github(files: Path) -> None:
    result = run(files / "net.keras", "--format", "github")
    first, second = result.output.splitlines()
    place = str(files / "net.keras").replace(":", "%3A").replace(",", "%2C")
    assert result.exit_code == 1
    assert first == (
        f"::notice file={place},title=BN201 bias-before-norm::dense: it adds a bias that bn subtracts again. "
        "What to do: build it with use_bias=False, or let --fix drop it."
    )
    assert second.startswith(f"::warning file={place},title=BN303 momentum-convention::bn: ")
    hostile = Finding("BN404", "dead-gamma", "note", "a\n::error::b", "50 % off", "why", "nothing")
    (line,) = workflow_commands(Report(check(files / "net.keras").network, (hostile,)))
    assert line == "::notice title=BN404 dead-gamma::a\\n:\\x3aerror:\\x3ab: 50 %25 off. What to do: nothing."


def test_exit_zero(files: Path) -> None:
    found = run(files / "net.keras", "--exit-zero")
    assert (found.exit_code, found.output) == (0, run(files / "net.keras").output)
    assert run("nowhere.keras", "--exit-zero").exit_code == 2


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_explain_shows_the_page_of_a_finding(rule: Rule) -> None:
    for word in (rule.code, rule.code.lower(), rule.name):
        result = run("--explain", word)
        assert result.exit_code == 0
        assert result.output.startswith(f"# {rule.code} {rule.name}\n\n**{rule.title}.**")
        assert "## When it is reported" in result.output
        assert "](../" not in result.output


def test_sarif_carries_the_page_of_a_finding() -> None:
    rules = sarif(check(keras_model()))["runs"][0]["tool"]["driver"]["rules"]
    assert {rule["id"]: rule["help"]["markdown"] for rule in rules} == {rule.code: manual(rule.code) for rule in RULES}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.keras"], "there is no file nowhere.keras"),
        (["{files}/data.npz"], "no .keras file"),
        (["{files}/net.keras", "--data", "nowhere.npz"], "there is no nowhere.npz"),
        (["{files}/net.keras", "--select", "BN7"], "--select takes codes"),
        (["{files}/net.keras", "--json", "--sarif"], "printed in one form; received options for json and sarif"),
        (["{files}/net.keras", "--fix"], "-o says where"),
        (["{files}/net.keras", "-o", "x.keras"], "-o says where"),
        (["{files}/net.keras", "--fix", "-o", "x.txt"], "received 'x.txt'"),
        (["{files}/net.keras", "--html", "/nowhere/x.html"], "cannot write '/nowhere/x.html'"),
        (["--explain", "BN2"], "there is no finding 'BN2'; there are BN101, "),
        (["{files}/net.keras", "--shape", "32,?"], "--shape needs all sizes"),
    ],
)
def test_what_cannot_be_answered_is_one_line(files: Path, arguments: list[str], words: str) -> None:
    result = run(*(each.format(files=files) for each in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


@pytest.mark.parametrize("value", ["0", "-2", "two", "1.5"])
def test_replicas_are_counted(files: Path, value: str) -> None:
    result = run(files / "net.keras", f"--replicas={value}")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "--replicas takes a whole number of 1 or more; received" in result.stderr


@pytest.mark.parametrize(
    ("name", "value", "least"), [("replicas", 0, 1), ("replicas", 2.0, 1), ("batch_size", 0, 1), ("steps", -1, 0)]
)
def test_counts_below_their_least_are_refused(name: str, value: object, least: int) -> None:
    with pytest.raises(ArgumentError) as refused:
        check(keras_model(), **{name: value})
    assert str(refused.value) == f"{name} is a whole number, {least} or more; received {name}={value!r}"


@pytest.mark.parametrize(
    ("convert", "values"), [(False, "each mean is computed from 16 values on each of 4 replicas"), (True, None)]
)
def test_replicas_share_the_batch_of_a_torch_model(convert: bool, values: str | None) -> None:
    model = torch_model()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if convert else model
    findings = check(model, shape=(64, 6), batch_size=64, replicas=4, select=["BN505"]).findings
    assert [finding.what.split(";")[0] for finding in findings] == ([] if values is None else [values])


def test_replicas_share_the_batch_of_a_keras_model() -> None:
    """On JAX one array lies on all of them, and its statistics are those of the whole."""
    for synchronized in (False, True):
        norm = BatchNormalization(synchronized=True) if synchronized else layers.BatchNormalization()
        model = keras.Sequential([keras.Input((6,)), layers.Dense(5), norm, layers.ReLU(), layers.Dense(3)])
        findings = check(model, batch_size=64, replicas=4, select=["BN505"]).findings
        together = synchronized or keras.backend.backend() == "jax"
        assert len(findings) == (0 if together else 1)
        (finding,) = check(model, batch_size=16, replicas=4, select=["BN505"]).findings
        share = "of all 4 replicas together" if together else "on each of 4 replicas"
        assert f"values {share}" in finding.what


def test_data_of_another_shape(files: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros((8, 7), "float32"))
    result = run(files / "net.keras", "--data", tmp_path / "other.npz")
    assert result.exit_code == 2
    assert "takes samples of shape 6; received 7" in result.stderr
