"""The halves of a pass on a GPU: with the statistics of several devices in between they are those of the whole batch."""

from __future__ import annotations

import numpy as np
import pytest

from tests.contract.on_triton import DEVICE, numpy, on_gpu_kernels, tensor  # isort: skip, may skip all

import torch

from evennorm.core.activation import RELU
from evennorm.core.call import Call
from evennorm.core.exchange import merged, packed
from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments
from evennorm.torch import batch_norm
from evennorm.torch.gpu import triton_kernel
from evennorm.torch.namespace import xp
from tests.grids import pairwise

__all__ = ["on_gpu_kernels"]

SHAPES = {
    "rows on the chip": ((61, 20), 1),
    "rows streamed": ((3_001, 40), 1),
    "planes on the chip": ((9, 5, 7, 7), 1),
    "planes streamed": ((3, 2, 81, 79), 1),
    "one value on a device": ((3, 5), 1),
}


@pytest.mark.parametrize(*pairwise(name=list(SHAPES), with_residual=[False, True], dtype=["float32", "float64", "bfloat16"]))
def test_two_devices_are_one(name: str, with_residual: bool, dtype: str) -> None:
    shape, axis = SHAPES[name]
    rng = np.random.default_rng(4)
    x, residual, dy = (tensor(rng.normal(m, 2, shape), dtype) for m in (50, 0, 0))
    acc = "float64" if dtype == "float64" else "float32"
    gamma, beta = (tensor(rng.uniform(0.5, 1.5, shape[axis]), acc) for _ in range(2))
    leaves = [t.clone().requires_grad_() for t in (x, gamma, beta, residual)]
    residuals = {"residual": leaves[3]} if with_residual else {}
    y, _ = batch_norm(*leaves[:3], axis=axis, activation="relu", **residuals)
    expected = torch.autograd.grad(y, leaves if with_residual else leaves[:3], dy)

    kernel, sizes = triton_kernel(), (shape[0] - shape[0] // 3, shape[0] // 3)
    parts = [t.split(sizes) for t in (x, residual, dy)]
    calls = [Call(Geometry((n, *shape[1:]), axis), dtype, activation=RELU) for n in sizes]
    local = [
        Moments(call.count(tuple(part.shape)), *kernel.moments(call, part))
        for call, part in zip(calls, parts[0], strict=True)
    ]
    whole = merged(xp, torch.stack([packed(xp, m) for m in local]), 1, shape[axis])
    statistics, found, saved = torch.stack(whole[1:]), [], []
    for call, part, beside in zip(calls, parts[0], parts[1], strict=True):
        out, kept = kernel.forward(call, part, gamma, beta, beside if with_residual else None, statistics=statistics)
        found.append(out)
        saved.append(kept)
    tolerance = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 1e-2}[dtype]
    close = {"rtol": tolerance, "atol": 10 * tolerance}
    np.testing.assert_allclose(numpy(torch.cat(found)), numpy(y.detach()), **close)

    halves = [
        kernel.gradient_sums(*given) for given in zip(calls, parts[2], parts[0], [gamma] * 2, [beta] * 2, saved, strict=True)
    ]
    total = halves[0][0] + halves[1][0]
    gradients = [
        kernel.input_gradient(*given, total, whole.count)
        for given in zip(calls, parts[2], parts[0], [gamma] * 2, [beta] * 2, saved, strict=True)
    ]
    np.testing.assert_allclose(numpy(torch.cat([dx for dx, _ in gradients])), numpy(expected[0]), **close)
    for i in (1, 2):
        scale = abs(numpy(expected[i])).max()
        np.testing.assert_allclose(
            numpy(halves[0][i] + halves[1][i]), numpy(expected[i]), rtol=0, atol=10 * tolerance * scale
        )
    if with_residual:
        np.testing.assert_allclose(numpy(torch.cat([d for _, d in gradients])), numpy(expected[3]), **close)


def test_an_empty_device_has_no_sums() -> None:
    call, kernel = Call(Geometry((0, 3), 1)), triton_kernel()
    x = torch.empty((0, 3), device=DEVICE)
    statistics = kernel.moments(call, x)
    assert not statistics.any()
    sums, d_gamma, _ = kernel.gradient_sums(call, x, x, torch.ones(3, device=DEVICE), None, (statistics, None))
    assert not sums.any()
    assert not d_gamma.any()
    dx, _ = kernel.input_gradient(call, x, x, None, None, (statistics, None), sums, torch.ones((1, 1), device=DEVICE))
    assert dx.shape == (0, 3)
