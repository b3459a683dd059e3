"""The promise of the accuracy table, on the engine of this process: 2e-6 at any mean, gradients within 1e-5 at mean 1e4."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from evennorm.keras import BatchNormalization

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy.py"))


@pytest.mark.parametrize(("shape", "axis"), [((16, 14, 14, 8), -1), ((16, 8, 14, 14), 1), ((256, 16), -1)])
@pytest.mark.parametrize("mean", SCRIPT["MEANS"])
def test_output_and_gradient(shape: tuple[int, ...], axis: int, mean: float) -> None:
    errors = SCRIPT["training_errors"](BatchNormalization, shape, axis, mean)
    assert errors["output"] <= 2e-6
    assert errors["gradient"] <= 1e-5


def test_the_reference_is_batch_normalization() -> None:
    """What errors are taken against, on numbers worked by hand: mean 2, variance 1 - epsilon."""
    x = 2 + np.sqrt(1 - SCRIPT["EPSILON"]) * np.array([[-1.0], [1.0], [-1.0], [1.0]])
    y, gradient = SCRIPT["expected"](x, np.array([[1.0], [0.0], [0.0], [0.0]]), -1)
    xhat = x - 2
    np.testing.assert_allclose(y, xhat, rtol=1e-12)
    np.testing.assert_allclose(gradient, np.array([[1], [0], [0], [0]]) - 0.25 - xhat * xhat[0] / 4, rtol=1e-12)


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e5])
def test_inference_after_training(mean: float) -> None:
    """Off by the rounding of the stored moving mean, half a unit in the last place, and of the arithmetic."""
    y, y64, variance = SCRIPT["inference"](BatchNormalization, mean)
    rounding = np.spacing(np.float32(mean)) / 2 / np.sqrt(variance + SCRIPT["EPSILON"])
    assert (np.abs(y - y64) <= 2e-6 + rounding).all()


def test_the_page_shows_every_figure() -> None:
    """And finds our layer within its promise where the script measures both."""
    rows = SCRIPT["measure"](quick=True)
    assert all(row["error"] <= 1e-5 for row in rows if row["who"] == "ours" and row["table"] != "inference")
    rows = [{**row, "error": float("nan") if row["who"] == "Keras's" else 0.5} for row in rows]
    found = {"jax": rows, "torch": rows, "tensorflow": rows, "numpy": SCRIPT["measure_numpy"](quick=True)}
    text = SCRIPT["page"](found, {"device": "a device", "versions": {"keras": "3"}})
    figures = 3 * 5 * len(SCRIPT["means"](quick=True))
    assert (text.count(" NaN |"), text.count(" 5.0e-01 |")) == (figures, figures)
    assert "| mean | jax: ours | jax: Keras's | torch: ours |" in text
    assert "| tensorflow: Keras's | numpy: ours |\n| ---: |" in text
    assert "Measured on a device, with keras 3." in text


def test_numpy_keeps_the_promise() -> None:
    rows = SCRIPT["measure_numpy"](quick=True)
    tables = [f"{what}, {layout}" for layout in SCRIPT["LAYOUTS"] for what in ("output", "gradient")]
    assert [row["table"] for row in rows] == tables * len(SCRIPT["means"](quick=True))
    assert max(row["error"] for row in rows) <= 2e-6
