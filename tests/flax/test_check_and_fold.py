"""`check` and `fold` on nnx models: what they find, and the same outputs as before."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx
from safetensors.numpy import load_file

from evennorm.cli import main
from evennorm.errors import InputError
from evennorm.flax import BatchNorm
from evennorm.flax.network import network
from evennorm.tools.check import check
from evennorm.tools.fold import fold

RANDOM = np.random.default_rng(0)


def norm(channels: int, kind=nnx.BatchNorm, **options):
    """A layer that has seen data."""
    made = kind(channels, rngs=nnx.Rngs(0), **options)
    made.mean[...] = RANDOM.normal(1, 1, channels).astype("float32")
    made.var[...] = RANDOM.uniform(0.5, 2, channels).astype("float32")
    made.scale[...] = RANDOM.uniform(0.5, 2, channels).astype("float32")
    made.bias[...] = RANDOM.normal(0, 1, channels).astype("float32")
    return made


def images(padding: str = "SAME") -> nnx.Sequential:
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Conv(3, 4, (3, 3), use_bias=False, padding=padding, rngs=rngs),
        norm(4),
        nnx.relu,
        nnx.Sequential(nnx.Conv(4, 6, (2, 2), feature_group_count=2, rngs=rngs), norm(6, BatchNorm, activation="relu6")),
    )


class Own(nnx.Module):
    def __init__(self):
        self.body = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), norm(3))
        self.last = nnx.Linear(3, 2, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.last(self.body(x))


def test_a_sequential_is_read_in_its_order() -> None:
    found = network(images(), np.zeros((2, 8, 8, 3), "float32"))
    assert [(step.name, step.role.value, step.shape) for step in found.steps] == [
        ("input", "input", (2, 8, 8, 3)),
        ("layers.0", "linear", (2, 8, 8, 4)),
        ("layers.1", "batch normalization", (2, 8, 8, 4)),
        ("layers.2:relu", "activation", (2, 8, 8, 4)),
        ("layers.3.layers.0", "linear", (2, 8, 8, 6)),
        ("layers.3.layers.1", "batch normalization", (2, 8, 8, 6)),
    ]
    assert [step.inputs for step in found.steps[1:]] == [(step.name,) for step in found.steps[:-1]]
    assert (found.gaps, found.outputs) == ((), ("layers.3.layers.1",))
    assert [step.bias for step in found.steps if step.role.value == "linear"] == [False, True]


def test_other_code_is_a_gap_and_its_sequentials_are_chains() -> None:
    found = network(Own())
    assert found.gaps[0].startswith("the model: the code of Own is not followed")
    chain = [step.name for step in found.steps if step.name.startswith("body")]
    assert chain == ["body:input", "body.layers.0", "body.layers.1", "body:output"]
    assert "last" in [step.name for step in found.steps]


def test_check_finds_what_it_finds_elsewhere() -> None:
    report = check(images(), shape=(2, 8, 8, 3), batch_size=64)
    assert [(finding.code, finding.layer) for finding in report.findings] == [("BN201", "layers.3.layers.0")]
    assert "use_bias=False" in report.findings[0].remedy
    assert [finding.code for finding in check(Own(), batch_size=64).findings] == ["BN201"]
    wrong = nnx.Sequential(nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=nnx.Rngs(0)), norm(8, axis=1))
    assert "BN101" in [finding.code for finding in check(wrong, shape=(2, 8, 8, 3), batch_size=64).findings]


def test_check_measures_drift() -> None:
    """The moving statistics are far from the data's in the first layer alone."""
    model = nnx.Sequential(norm(3, use_bias=True), nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0)))
    x = RANDOM.normal(7, 3, (64, 3)).astype("float32")
    before = np.array(model.layers[0].mean[...])
    report = check(model, [(x, None)])
    [layer] = report.measurements.layers
    assert np.allclose(layer.batch_mean, x.mean(0), atol=1e-5)
    assert np.allclose(layer.batch_variance, x.var(0), rtol=1e-5)
    assert layer.drift > 1
    assert layer.layer == "layers.0"
    assert np.array_equal(model.layers[0].mean[...], before)


def by_hand(model: nnx.Sequential, x: np.ndarray) -> np.ndarray:
    model.eval()
    return np.asarray(model(x))


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_fold_gives_the_same_outputs(padding) -> None:
    model = images(padding)
    report = fold(model, input_shape=[(8, 8, 3)], measure=False)
    assert [(each.layer, each.into, each.side) for each in report.layers] == [
        ("layers.1", ("layers.0",), "behind"),
        ("layers.3.layers.1", ("layers.3.layers.0",), "behind"),
    ]
    x = RANDOM.normal(0, 1, (4, 8, 8, 3)).astype("float32")
    assert np.allclose(by_hand(report.folded, x), by_hand(nnx.clone(model), x), atol=1e-5)
    assert not [part for _, part in nnx.iter_modules(report.folded) if isinstance(part, nnx.BatchNorm)]
    assert len([part for _, part in nnx.iter_modules(model) if isinstance(part, nnx.BatchNorm)]) == 2, "it stays as it is"


def test_in_front_of_a_layer_and_where_it_is_kept() -> None:
    rngs = nnx.Rngs(0)
    in_front = nnx.Sequential(norm(4), nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 2, rngs=rngs))
    report = fold(in_front, input_shape=[(4,)], measure=False)
    assert [(each.into, each.side) for each in report.layers] == [(("layers.2",), "in front of")]
    kept = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.relu, norm(4), nnx.relu, nnx.Conv(4, 2, (3,), rngs=rngs))
    report = fold(kept, input_shape=[(5, 4)], measure=False)
    assert [each.outcome for each in report.layers] == ["kept"]
    assert "the activation layers.1:relu stands in between" in report.layers[0].why
    padded = nnx.Sequential(norm(4), nnx.Conv(4, 2, (3,), rngs=rngs))
    report = fold(padded, input_shape=[(5, 4)], measure=False)
    assert "puts zeros around its input" in report.layers[0].why


def test_refusals_are_one_line() -> None:
    for call, words in (
        (lambda: fold(Own(), input_shape=[(4,)]), "received Own, whose code is not followed"),
        (lambda: fold(images()), "say what one sample is by --input-shape"),
        (lambda: fold(images(), "out.keras", input_shape=[(8, 8, 3)]), "are written to .safetensors"),
        (lambda: check(images(), shape=(2, 8, 8, 5)), "layers.0 does not take what it is given"),
        (lambda: check(images(), [(np.zeros((2, 8, 8, 5), "float32"), None)]), "layers.0 does not take"),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_from_the_command_line(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    Path("of_nnx.py").write_text(
        "from flax import nnx\n"
        "def net():\n"
        "    rngs = nnx.Rngs(0)\n"
        "    return nnx.Sequential(nnx.Linear(4, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))\n"
    )
    found = CliRunner().invoke(main, ["check", "of_nnx:net", "--shape", "16,4", "--select", "BN201"])
    assert found.exit_code == 1, found.output
    assert "BN201" in found.output
    done = CliRunner().invoke(main, ["fold", "of_nnx:net", "--input-shape", "4", "-o", "out.safetensors", "--no-speed"])
    assert done.exit_code == 0, done.output
    assert set(load_file("out.safetensors")) == {"layers.0.kernel", "layers.0.bias"}
    fixed = CliRunner().invoke(main, ["check", "of_nnx:net", "--fix", "-o", "out.safetensors"])
    assert fixed.exit_code == 2
    assert fixed.stderr.count("\n") == 1
    assert "no files of whole nnx models are written" in fixed.stderr
