"""Exchanging Keras's layer for ours in the articles' network leaves the training curve as it is, within rounding."""

from __future__ import annotations

import runpy
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.keras.backend import precision

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "training_curve.py"))


@pytest.fixture(scope="module")
def curves() -> dict[str, np.ndarray]:
    names = ("ours", "Keras's", "ours, smooth", "Keras's, smooth")
    found = SCRIPT["curves"](side=24, batch=16, steps=12, names=names)
    return {name: np.array(losses) for name, losses in found.items()}


def test_without_kinks_the_curves_are_the_same(curves: dict[str, np.ndarray]) -> None:
    """Losses near 2 are rounded to 2e-7, and each step's rounding lives on in the weights of the next: 2e-6 after 20."""
    assert curves["ours, smooth"].shape == (12,)
    np.testing.assert_allclose(curves["ours, smooth"], curves["Keras's, smooth"], rtol=0, atol=1e-5)
    assert np.ptp(curves["ours, smooth"]) > 0.1


def test_the_articles_network_trains_alike(curves: dict[str, np.ndarray]) -> None:
    """Up to the first value that rounding carries over a kink; one such changes the curve by up to 1e-2 in 20 steps."""
    np.testing.assert_allclose(curves["ours"][0], curves["Keras's"][0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(curves["ours"], curves["Keras's"], rtol=0, atol=0.03)
    assert np.ptp(curves["ours"]) > 0.1


def test_the_usual_precision_is_left(curves: dict[str, np.ndarray]) -> None:
    assert keras.config.floatx() == "float32"


def test_the_networks_are_what_they_are_called() -> None:
    network, runs = SCRIPT["network"], SCRIPT["RUNS"]

    def kinds(name: str) -> list[str]:
        return [f"{type(layer).__module__.split('.')[0]}.{type(layer).__name__}" for layer in network(24, runs[name]).layers]

    ours = kinds("ours")
    assert ours.count("evennorm.BatchNormalization") == 3
    assert not any("Dropout" in kind for kind in ours)
    theirs = [kind.replace("evennorm.", "keras.") for kind in ours]
    assert kinds("Keras's") == kinds("Keras's, nudged 1") == theirs
    assert kinds("Keras's, smooth") == [kind.replace("MaxPooling", "AveragePooling") for kind in theirs]
    activations = {
        layer.activation.__name__ for layer in network(24, runs["ours, smooth"]).layers if hasattr(layer, "kernel")
    }
    assert activations == {"softplus", "softmax"}
    with precision("float64"):
        assert {layer.dtype for layer in network(24, runs["float64"]).layers} == {"float64"}


def test_a_nudge_is_one_rounding() -> None:
    (weight,) = SCRIPT["nudged"]([np.linspace(1, 2, 1000, dtype=np.float32)], seed=1)
    changes = np.abs(weight / np.linspace(1, 2, 1000, dtype=np.float32) - 1)
    assert 0 < changes.max() <= np.finfo(np.float32).eps
    assert weight.dtype == np.float32


def test_the_page_shows_every_engine() -> None:
    row = {"ours": [2.0, 1.0], "Keras's": [2.0, 1.5], "float64": [2.0, 1.25]}
    row |= {"ours, smooth": [3.0, 2.0], "Keras's, smooth": [3.0, 2.125]}
    row |= {"Keras's, nudged 1": [2.0, 1.5], "Keras's, nudged 2": [2.0, 1.375], "Keras's, nudged 3": [2.0, 1.5]}
    text = SCRIPT["page"]({"jax": row}, {"device": "a device", "versions": {"keras": "3"}})
    assert "| jax | 2.0000 | 1.0000 | 1.2e-01 | 5.0e-01 | 2.5e-01 | 2.5e-01 | 1.2e-01 |" in text
    assert "trained for 2 steps of" in text
    assert "Measured on a device, with keras 3." in text
