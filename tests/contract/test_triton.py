"""The GPU kernels through `evennorm.torch` give the textbook's values, moments and gradients over the case table."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tests.contract.on_triton import DEVICE, LAST_PLACE, ROUNDING, numpy, on_gpu_kernels, parameters_of, tensor  # isort: skip, may skip all

import torch

from evennorm.core.activation import RELU
from evennorm.core.call import Call
from evennorm.core.geometry import Geometry
from evennorm.torch import batch_norm, normalize
from evennorm.torch.gpu import triton_kernel
from evennorm.torch.kernels import kernel_for
from tests.cases import CASES, SHAPES, Case
from tests.contract import textbook
from tests.grids import mostly, pairwise

__all__ = ["on_gpu_kernels"]

PLAIN = [case for case in CASES if case.mask is None and case.name != "variance below the smallest float32"]
"""Masks take the composed form; the variance of one case is 0 in float32."""

LAYOUTS = [
    # shapes whose tails are no powers of two, on the chip and streamed
    Case("rows, streamed", (5_003, 70), mean=3.0),
    Case("rows, few channels", (20_001, 3), mean=1e4),
    Case("rows, on the chip", (300, 33)),
    Case("images, channels last in memory", (6, 40, 21, 23), 1, mean=100.0),
    Case("images, small planes on the chip", (9, 11, 7, 7), 1),
    Case("images, planes streamed", (5, 3, 71, 73), 1, mean=1e5),
    Case("images, planes of one line", (130, 2, 14, 14), 1),
    Case("volumes, channels last in memory", (3, 6, 5, 9, 8), 1),
    Case("volumes", (3, 6, 5, 9, 8), 1),
    Case("ghost batches, streamed", (60, 3, 40, 41), 1, group=20),
]


def inputs(case: Case, dtype: str, residual: bool = False, spread: float = 1.0) -> tuple[dict, dict]:
    """Tensors, and the same numbers as float64 arrays, after rounding to `dtype`."""
    arrays = case.make()
    arrays["gamma"] = arrays["gamma"] * spread
    layout = "channels last" if "channels last in memory" in case.name else "as it is"
    kinds = {"gamma": parameters_of(dtype), "beta": parameters_of(dtype)}
    if not residual:
        del arrays["residual"]
    tensors = {name: tensor(values, kinds.get(name, dtype), layout) for name, values in arrays.items() if values is not None}
    return tensors, {name: numpy(values) for name, values in tensors.items()}


def check(case: Case, dtype: str, activation: str | None = None, residual: bool = False) -> None:
    tensors, exact = inputs(case, dtype, residual, textbook.spread(activation))
    dy, exact_dy = tensors.pop("dy"), exact.pop("dy")
    z = textbook.forward(case, **exact)
    exact_dy = np.where(textbook.to_a_bend(z, activation) > 1e-5, exact_dy, 0.0)
    dy = tensor(exact_dy, dtype)
    leaves = [leaf.requires_grad_() for leaf in tensors.values()]
    options = {"axis": case.axis, "epsilon": case.epsilon, "virtual_batch_size": case.group, "activation": activation}

    y, moments = batch_norm(**tensors, **options)
    expected = textbook.forward(case, **exact, activation=activation)
    largest = max(1.0, np.abs(expected).max(initial=0.0) / 2)
    assert y.shape == case.shape
    assert y.dtype is tensors["x"].dtype
    np.testing.assert_allclose(numpy(y), expected, rtol=LAST_PLACE[dtype], atol=ROUNDING[dtype] * largest)
    if case.group is None:
        check_moments(case, exact["x"], moments, dtype)

    gradients = torch.autograd.grad(y, leaves, dy)
    wanted = textbook.backward(case, exact_dy, **exact, activation=activation)
    bound = 1e-9 if dtype == "float64" else 1e-5
    for name, found, b in zip(tensors, gradients, wanted, strict=False):
        largest = max(1.0, np.abs(b).max(initial=0.0))
        place = LAST_PLACE[dtype] if name in ("x", "residual") else 0
        np.testing.assert_allclose(numpy(found), b.reshape(found.shape), rtol=place, atol=bound * largest, err_msg=name)
        assert found.dtype is tensors[name].dtype


def check_moments(case: Case, x: np.ndarray, moments, dtype: str) -> None:
    count, mean, variance = textbook.statistics(case, x, None)
    rounding = 1e-12 if dtype == "float64" else 5e-7
    assert moments.count == (count.flat[0] if count.size else moments.count)
    found_mean, low = numpy(moments.mean), numpy(moments.mean_low)
    deviation = np.sqrt(variance).reshape(case.parameter_shape)
    # float64 itself holds a mean of 1e5 to 1e-11.
    room = rounding * (deviation + np.abs(low)) + 1e-30 + (2e-11 * abs(case.mean) / 1e5 if dtype == "float64" else 0)
    assert (np.abs((found_mean + low) - mean.reshape(case.parameter_shape)) <= room).all()
    np.testing.assert_allclose(
        numpy(moments.variance), variance.reshape(case.parameter_shape), rtol=10 * rounding, atol=1e-30
    )


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_values_moments_and_gradients(case: Case) -> None:
    check(case, "float32")


@pytest.mark.parametrize(
    *mostly(lambda case: case.name in SHAPES, "case", [(case,) for case in PLAIN if "long" not in case.name])
)
def test_in_double_precision(case: Case) -> None:
    check(case, "float64", "leaky_relu", residual=True)


@pytest.mark.parametrize(
    *mostly(
        lambda case, activation: LAYOUTS.index(case) % 2 == (activation == "relu"),
        "case, activation",
        product(LAYOUTS, ["relu", "leaky_relu"]),
    )
)
def test_layouts_through_residual_and_activation(case: Case, activation: str) -> None:
    check(case, "float32", activation, residual=activation == "relu")


@pytest.mark.parametrize(("name", "residual"), [("rows, on the chip", True), ("images, planes of one line", False)])
def test_relu6(name: str, residual: bool) -> None:
    check(next(case for case in LAYOUTS if case.name == name), "float32", "relu6", residual)


HALF = [
    "rows, few channels",
    "images, small planes on the chip",
    "images, channels last in memory",
    "images, planes streamed",
]


@pytest.mark.parametrize(
    *mostly(
        lambda case, dtype: HALF.index(case.name) % 2 == (dtype == "float16"),
        "case, dtype",
        product([case for case in LAYOUTS if case.name in HALF], ["float16", "bfloat16"]),
    )
)
def test_half_precision_is_read_and_written_as_it_is(case: Case, dtype: str) -> None:
    near = Case(case.name, case.shape, case.axis, mean=1.0)
    check(near, dtype, "relu", residual=dtype == "bfloat16")


@pytest.mark.parametrize(
    *pairwise(
        parameters=["float32", "bfloat16", None],
        shape=[(40, 6), (5_001, 40), (3, 4, 50, 51)],
        dtype=["float32", "bfloat16"],
    )
)
def test_inference(parameters: str | None, shape: tuple[int, ...], dtype: str) -> None:
    rng = np.random.default_rng(0)
    axis = 1
    kind = parameters or "float32"
    x, residual = (tensor(rng.standard_normal(shape) + m, dtype) for m in (1e3 if dtype == "float32" else 1, 0))
    mean = rng.normal(1e3 if dtype == "float32" else 1, 1, shape[axis])
    statistics = [tensor(a, kind) for a in (mean, rng.uniform(0.5, 2, shape[axis]))]
    affine = [None if parameters is None else tensor(rng.uniform(0.5, 1, shape[axis]), kind) for _ in range(2)]
    assert kernel_for(x, *statistics, *affine, residual) is triton_kernel()
    with torch.no_grad():
        y = normalize(x, *statistics, *affine, axis=axis, epsilon=1e-3, activation="relu", residual=residual)
    m, v, g, b = (
        np.reshape(default if s is None else numpy(s), (-1, *(1,) * (len(shape) - 2)))
        for s, default in zip((*statistics, *affine), (0, 1, 1.0, 0.0), strict=True)
    )
    expected = np.maximum((numpy(x) - m) / np.sqrt(v + 1e-3) * g + b + numpy(residual), 0)
    bound = ROUNDING[dtype] * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(numpy(y), expected, rtol=LAST_PLACE[dtype], atol=bound)


def test_what_is_kept_between_the_passes() -> None:
    """x, three numbers per channel and, where an activation follows a residual, one bit per element."""
    x, residual = torch.randn(2, 800, 64, device=DEVICE)
    call = Call(Geometry((800, 64)), epsilon=1e-3, activation=RELU)
    for other in (None, residual):
        y, saved = triton_kernel().forward(call, x, None, None, other)
        statistics, mask = saved
        assert statistics.shape == (3, 1, 64)
        assert (mask is not None) == (other is not None)
    assert mask.numel() * 8 == x.numel()
    assert y.shape == x.shape


@pytest.mark.parametrize("parameters", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("shape", [(40, 6), (5_001, 40)])
def test_parameters_of_any_dtype(shape: tuple[int, ...], parameters: str) -> None:
    rng = np.random.default_rng(0)
    x, dy = (tensor(rng.standard_normal(shape), "float32") for _ in range(2))
    gamma, beta = (tensor(rng.uniform(0.5, 1, shape[1]), parameters) for _ in range(2))
    call, kernel = Call(Geometry(shape)), triton_kernel()
    for _ in range(2):  # one plan for each dtype
        y, saved = kernel.forward(call, x, gamma, beta)
        dx, d_gamma, _, _ = kernel.backward(call, dy, x, gamma, beta, saved, False)
        wide_y, _ = kernel.forward(call, x, gamma.float(), beta.float())
        wide_dx, wide_d_gamma, _, _ = kernel.backward(call, dy, x, gamma.float(), beta.float(), saved, False)
        torch.testing.assert_close(y, wide_y, rtol=0, atol=1e-6)
        torch.testing.assert_close(dx, wide_dx, rtol=0, atol=1e-6)
        assert d_gamma.dtype is gamma.dtype
        torch.testing.assert_close(d_gamma.float(), wide_d_gamma, rtol=1e-2, atol=1e-5)
