"""Every engine agrees on what an activation is at its bends: exactly 0 and 6 and beyond them."""

import numpy as np
import pytest

from tests.cases import Case
from tests.contract import textbook
from tests.contract.engines import ENGINES

AT = np.array([-1e30, -1.0, 0.0, 1e-30, 3.0, np.nextafter(np.float32(6), 0), 6.0, np.nextafter(np.float32(6), 7), 1e30])
RUNS = [name for name in ENGINES if name not in ("numpy", "tensorflow function, unknown sizes", "torch compile")]


def arrays(**changed: np.ndarray) -> dict[str, np.ndarray]:
    """gamma is 0, so that z is beta + residual to the last bit."""
    shape = (4, len(AT))
    zero = {"gamma": np.zeros(len(AT)), "beta": np.zeros(len(AT))}
    x, dy = np.random.default_rng(3).standard_normal((2, *shape)).astype(np.float32).astype(np.float64)
    return {"x": x, **zero, "dy": dy, **changed}


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("name", RUNS)
def test_at_its_bends(name: str, activation: str) -> None:
    case, engine = Case("at", (4, len(AT))), ENGINES[name]
    given = arrays(residual=np.tile(AT, (4, 1)))
    expected = textbook.derivative(AT, activation)
    y, _ = engine.forward(case, {key: a for key, a in given.items() if key != "dy"}, "float32", activation=activation)
    np.testing.assert_array_equal(y, np.tile(textbook.activated(AT, activation), (4, 1)).astype(np.float32))
    *_, d_residual = engine.backward(case, given, "float32", activation=activation)
    np.testing.assert_allclose(d_residual, given["dy"] * expected, rtol=1e-6)
    given = arrays(beta=AT)
    d_beta = engine.backward(case, given, "float32", activation=activation)[2]
    np.testing.assert_allclose(d_beta, given["dy"].sum(0) * expected, rtol=1e-5, atol=1e-6)
