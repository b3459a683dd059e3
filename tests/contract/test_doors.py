"""What a user can hand to batch_norm and normalize of an engine that does not fit, and what is said."""

import re
from typing import Any

import numpy as np
import pytest

from evennorm import ArgumentError, ShapeError
from evennorm.core.activation import LINEAR, RELU, RELU6, Activation, activation_of
from evennorm.kernels import choose
from evennorm.numpy import batch_norm, normalize
from tests.contract.engines import ENGINES
from tests.grids import pairwise

X = np.zeros((4, 5, 3), np.float32)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"gamma": np.ones(4, np.float32)},
            ShapeError,
            "shape (3,) for an array of shape (4, 5, 3) with axis=(2,); received shape (4,)",
        ),
        ({"axis": 3}, ShapeError, "axis 3 was asked of a shape of rank 3, (4, 5, 3); valid axes are -3 to 2"),
        ({"mask": np.ones((4, 3), bool)}, ShapeError, "received a mask of shape (4, 3)"),
        ({"residual": X[:2]}, ShapeError, "has its shape, (4, 5, 3); received shape (2, 5, 3)"),
        ({"virtual_batch_size": 3}, ShapeError, "received 4 samples and virtual_batch_size=3"),
        ({"activation": "gelu"}, ArgumentError, "activation is one of None, 'relu', 'relu6', 'leaky_relu'; received 'gelu'"),
        ({"epsilon": -1e-3}, ArgumentError, "received epsilon=-0.001"),
        ({"epsilon": float("nan")}, ArgumentError, "received epsilon=nan"),
    ],
)
def test_errors_name_the_rule_and_what_arrived(options: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        batch_norm(X, **options)


@pytest.mark.parametrize("engine", ["numpy", "jax", "torch", "tensorflow"])
@pytest.mark.parametrize("name", ["x", "gamma", "beta", "residual", "mean", "variance"])
def test_complex_numbers_are_refused(engine: str, name: str) -> None:
    """By name, and not cut down to their real parts."""
    module = ENGINES[engine].module
    row = np.ones(3, np.float32)
    given = {"x": X, "gamma": row, "beta": row, "residual": X}
    statistics = {"mean": row, "variance": row}
    for call, arrays in ((module.batch_norm, given), (module.normalize, given | statistics)):
        if name in arrays:
            arrays = {n: to_engine(module, a.astype("complex64") if n == name else a) for n, a in arrays.items()}
            with pytest.raises(
                ArgumentError, match=rf"of real numbers.*; {name} is of dtype (torch\.)?complex64; pass"
            ) as caught:
                call(**arrays)
            assert "\n" not in str(caught.value)


def to_engine(module: Any, array: np.ndarray) -> Any:
    match module.__name__:
        case "evennorm.torch":
            return pytest.importorskip("torch").from_numpy(array)
        case "evennorm.tensorflow":
            return pytest.importorskip("tensorflow").constant(array)
        case "evennorm.jax":
            return pytest.importorskip("jax").numpy.asarray(array)
    return array


def test_statistics_of_the_wrong_size() -> None:
    with pytest.raises(ShapeError, match=re.escape("received shape (5,)")):
        normalize(X, np.zeros(5), np.ones(5))


@pytest.mark.parametrize(
    *pairwise(
        mean=[0.0, 1e5],
        engine=["numpy", "jax", "torch", "tensorflow", "tensorflow xla", "jax jit"],
        axis=[-1, 1, (0, 2), (0, 1)],
    )
)
def test_inference_on_every_engine(mean: float, engine: str, axis: int | tuple[int, ...]) -> None:
    """Exact at large means, on TensorFlow's fused op too, which XLA by itself would turn into x * scale + offset."""
    under_test = ENGINES[engine]
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4, 5, 3)) + mean).astype(np.float32).astype(np.float64)
    axes = [a % 3 for a in ((axis,) if isinstance(axis, int) else axis)]
    shape = tuple(x.shape[a] for a in sorted(axes))
    reduced = tuple(a for a in range(3) if a not in axes)
    statistics = [rng.normal(mean, 1, shape), rng.uniform(0.5, 2, shape), rng.uniform(0.5, 2, shape), rng.normal(size=shape)]
    statistics = [s.astype(np.float32).astype(np.float64) for s in statistics]
    residual = rng.standard_normal(x.shape).astype(np.float32).astype(np.float64)

    def compute(x, mean, variance, gamma, beta, residual):
        return under_test.module.normalize(
            x, mean, variance, gamma, beta, axis=axis, epsilon=1e-3, activation="relu", residual=residual
        )

    y = under_test._compiled(compute)(*(under_test._tensor(a, "float32") for a in (x, *statistics, residual)))
    m, v, g, b = (np.expand_dims(s, reduced) for s in statistics)
    expected = np.maximum((x - m) / np.sqrt(v + 1e-3) * g + b + residual, 0)
    np.testing.assert_allclose(under_test._numpy(y), expected, rtol=0, atol=4e-6)


def test_which_kernel_serves_is_a_pure_function() -> None:
    assert choose("tensorflow", "float32", compiled=True, forced=None) == "cpu"
    assert choose("tensorflow", "float32", compiled=False, forced=None) == "reference"
    assert choose("tensorflow", "float32", compiled=True, device="gpu", forced=None) == "reference"
    assert choose("tensorflow", "float32", forced="reference") == "reference"
    assert choose("tensorflow", "float32", training=False, compiled=True, forced=None) == "reference"
    assert choose("jax", "float32", training=False) == "reference"
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        assert choose("torch", dtype, device="cuda", compiled=True, forced=None) == "triton"
    assert choose("torch", "float32", device="cuda", compiled=False, forced=None) == "reference"
    assert choose("torch", "float32", device="cuda", compiled=True, forced="reference") == "reference"
    assert choose("torch", "int32", device="cuda", compiled=True, forced=None) == "reference"
    assert choose("jax", "float32", device="cuda", compiled=True, forced=None) == "reference"


def test_activations_by_name() -> None:
    assert [activation_of(name) for name in (None, "relu", "relu6")] == [LINEAR, RELU, RELU6]
    assert activation_of("leaky_relu", 0.3) == Activation(0.3)
    assert [each.name for each in (LINEAR, RELU, RELU6, Activation(0.3))] == ["none", "relu", "relu6", "leaky_relu"]


def test_vmap_over_batch_norm() -> None:
    import jax

    from evennorm.jax import batch_norm as jax_batch_norm
    from tests.oracle import batch_norm

    x = np.random.default_rng(0).standard_normal((3, 6, 4)).astype(np.float32)
    together = jax.vmap(lambda a: jax_batch_norm(a)[0])(x)
    np.testing.assert_allclose(together, np.stack([batch_norm(a.astype(float))[0] for a in x]), atol=2e-6)
    gradients = jax.vmap(jax.grad(lambda a: (jax_batch_norm(a)[0] ** 3).sum()))(x)
    one_by_one = np.stack([jax.grad(lambda a: (jax_batch_norm(a)[0] ** 3).sum())(a) for a in x])
    np.testing.assert_allclose(gradients, one_by_one, atol=1e-5)
