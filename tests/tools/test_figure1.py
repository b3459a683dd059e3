"""benchmarks/figure1.py: the network computes what it says, and the typical unit is the one in the middle."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def figure1():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import figure1

        yield figure1
        for name in ("figure1", "_figure1", "_environment"):
            sys.modules.pop(name, None)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("normalized", [False, True])
def test_the_network(figure1, normalized):
    """A step's moving statistics and the scores after it, against float64."""
    random = np.random.default_rng(0)
    x = (random.random((60, 12)) > 0.5).astype("float32")
    state = figure1.initial(0, 12)
    after = figure1.steps(state, np.arange(60)[None], 0.0, x, np.zeros(60, "int32"), normalized)
    scores, inputs, _ = figure1.predict(after["trained"], after["moving"], x, normalized, training=False)
    expected = x.astype("float64")
    batch = expected
    for i in range(figure1.LAYERS):
        weight = state["trained"][f"weight{i}"].astype("float64")
        batch, before = batch @ weight, expected @ weight
        if normalized:
            mean, variance = 0.01 * batch.mean(0), 0.99 + 0.01 * batch.var(0)
            np.testing.assert_allclose(after["moving"][f"mean{i}"], mean, atol=1e-6)
            np.testing.assert_allclose(after["moving"][f"variance{i}"], variance, rtol=1e-5)
            batch = (batch - batch.mean(0)) / np.sqrt(batch.var(0) + figure1.EPSILON)
            before = (before - mean) / np.sqrt(variance + figure1.EPSILON)
        batch, expected = sigmoid(batch), sigmoid(before)
    np.testing.assert_allclose(inputs, before, atol=1e-4)
    np.testing.assert_allclose(scores, expected @ state["trained"][f"weight{figure1.LAYERS}"], atol=1e-4)


def test_the_typical_unit(figure1):
    percentiles = np.zeros((4, 3, 5))
    percentiles[:, 2] = 2.0
    percentiles[1, 1] = [4, 1, 3, 0, 2]
    np.testing.assert_allclose(figure1.drift(percentiles), [2, 0.5, 1.5, 0, 1])
    assert figure1.typical(percentiles) == 4


def test_every_epoch_sees_each_sample_once(figure1):
    batches = figure1.orders(3, 130, 5)
    assert batches.shape == (5, 60)
    for epoch in (batches[:2], batches[2:4]):
        assert len(np.unique(epoch)) == 120


def test_the_page_is_that_of_the_results(figure1):
    import _figure1

    results = json.loads(figure1.RESULTS.read_text())
    assert (figure1.ROOT / "docs" / "figure-1.md").read_text() == _figure1.page(results)
