"""Test what the GPU kernels promise beside right values: activation bits, the same bits, hard data, any memory."""

from __future__ import annotations

import numpy as np
import pytest

from tests.contract.on_triton import DEVICE, numpy, on_gpu_kernels, tensor  # isort: skip, may skip all

import torch

from evennorm.core.activation import RELU, Activation
from evennorm.core.call import Call
from evennorm.core.geometry import Geometry
from evennorm.kernels.triton import tiling
from evennorm.torch import batch_norm, engine
from evennorm.torch.gpu import triton_kernel
from tests.contract.near_6 import check_values_near_6

__all__ = ["on_gpu_kernels"]

SHAPES = {
    "rows on the chip": ((61, 20), 1),
    "rows streamed": ((3_001, 40), 1),
    "rows of three": ((9_001, 3), 1),
    "planes on the chip": ((9, 5, 7, 7), 1),
    "planes streamed": ((3, 2, 81, 79), 1),
}


def forget_plans() -> None:
    tiling.tiling_of.cache_clear()
    engine.make_call.cache_clear()


every_shape = pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)


@every_shape
@pytest.mark.parametrize("group", [False, True])
def test_activation_bits_are_those_of_the_output(shape, axis, group) -> None:
    x, residual = (torch.randn(shape, device=DEVICE) for _ in range(2))
    geometry, group_size = Geometry(shape, axis), None
    if group:
        x, residual = (torch.cat([t, 2 * t]) for t in (x, residual))
        geometry, group_size = Geometry(x.shape, axis), shape[0]
    call = Call(geometry, epsilon=1e-3, activation=Activation(0.1), group_size=group_size)
    for values in (x, torch.cat([x, x], -1)[..., : x.shape[-1]]):  # the second has gaps in memory
        y, saved = triton_kernel().forward(call, values, None, None, residual)
        assert torch.equal(triton_kernel().open_elements(call, values, None, None, saved), y > 0)


@every_shape
def test_values_near_zero_agree_in_forward_and_backward(shape, axis) -> None:
    """Where the gradient is let through, so was the value: the sign is worked out again to the last bit."""
    x = torch.randn(shape, device=DEVICE)
    x.flatten()[::3].mul_(1e-7)  # many close to the mean, where rounding decides
    x.requires_grad_()
    beta = torch.full((shape[axis],), 1e-8, device=DEVICE)
    y, moments = batch_norm(x, None, beta, axis=axis, activation="relu")
    residual = torch.zeros_like(x).requires_grad_()
    y_residual, _ = batch_norm(x, None, beta, axis=axis, activation="relu", residual=residual)
    (share,) = torch.autograd.grad(y_residual.sum(), residual)
    assert torch.equal(share == 1, y_residual > 0)
    assert torch.equal(y > 0, y_residual > 0)
    # dx = scale * dz - ...: what is added to it by dy at one element shows whether that element was open.
    call, dy = Call(Geometry(shape, axis), activation=RELU), torch.ones_like(x)
    saved = torch.stack([statistic.detach().reshape(1, -1) for statistic in moments[1:]]), None
    _, _, d_beta, _ = triton_kernel().backward(call, dy, x.detach(), None, beta, saved, False)
    count = (y > 0).sum([a for a in range(len(shape)) if a != axis])
    assert torch.equal(d_beta.round().long(), count.long())


def test_values_near_6_agree_in_forward_and_backward() -> None:
    check_values_near_6((300, 33), DEVICE)


@every_shape
def test_the_same_bits_every_time(shape, axis) -> None:
    def results() -> list[torch.Tensor]:
        torch.manual_seed(3)
        leaves = [(torch.randn(s, device=DEVICE) + 5).requires_grad_() for s in (shape, shape[axis], shape)]
        y, moments = batch_norm(leaves[0], leaves[1], axis=axis, activation="relu", residual=leaves[2])
        return [y, *moments[1:], *torch.autograd.grad(y.square().sum(), leaves)]

    first, second = results(), results()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_shape
def test_offsets_of_64_bits_give_the_same_bits(shape, axis, monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy, residual = (torch.randn(shape, device=DEVICE) for _ in range(3))

    def results() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        y, moments = batch_norm(leaves[0], axis=axis, activation="relu", residual=leaves[1])
        return [y, *moments[1:], *torch.autograd.grad(y, leaves, dy)]

    narrow = results()
    forget_plans()
    monkeypatch.setattr(tiling, "INT32", 0)
    wide = results()
    forget_plans()
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("shape", [(1, 20), (1, 3000, 1), (1, 5, 1, 1)])
def test_a_value_alone_in_its_channel_has_no_gradient(shape) -> None:
    """It is its own mean: dy acts on nothing, to the last bit, however small epsilon makes the deviation."""
    x = torch.randn(shape, device=DEVICE).requires_grad_()
    y, _ = batch_norm(x, axis=1, epsilon=1e-12, activation="relu", residual=torch.ones_like(x))
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert not dx.any()


HARD = {
    "starts with zeros": lambda x: np.concatenate([np.zeros_like(x[: len(x) // 8]), x[len(x) // 8 :] + 1e4]),
    "one outlier first": lambda x: np.concatenate([np.full_like(x[:1], 1e5), x[1:]]),
    "jumps": lambda x: x + 1e4 * (np.arange(len(x))[:, None] // 700 % 3),
    "drifts": lambda x: x + np.linspace(-1e4, 1e5, len(x))[:, None],
    "tiny beside a mean": lambda x: 1e-3 * x + 10,
    "a large mean": lambda x: x + 1e6,
}


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("name", HARD)
def test_moments_of_hard_data(name: str, planes: bool) -> None:
    """A shift taken once, from the first values, would cost digits of the variance here."""
    rng = np.random.default_rng(4)
    values = HARD[name](rng.standard_normal((9_001, 3))).astype(np.float32)
    x = tensor(values.T[None] if planes else values, "float32")
    exact = values.astype(np.longdouble)
    _, moments = batch_norm(x, axis=1)
    mean, variance = exact.mean(0), exact.var(0)
    np.testing.assert_allclose(numpy(moments.variance), variance, rtol=1e-6)
    error = np.abs(numpy(moments.mean) + numpy(moments.mean_low) - mean)
    assert (error <= 3e-7 * np.sqrt(variance)).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, in which the interpreter computes
def test_what_is_not_finite_stays_in_its_channel() -> None:
    for shape in ((61, 4), (5_001, 4), (3, 4, 60, 61)):
        x = torch.randn(shape, device=DEVICE)
        x[1, 0], x[2, 1] = float("nan"), float("inf")
        y, moments = batch_norm(x, axis=1, activation="relu")
        assert y[:, 0].isnan().all()
        assert not moments.variance[:2].isfinite().any()
        assert y[:, 2:].isfinite().all()
        assert moments.variance[2:].isfinite().all()


@pytest.mark.parametrize("streamed", [False, True])
def test_memory_of_any_kind(streamed: bool) -> None:
    """What has gaps or lies otherwise than x is copied first; nothing is written to what was given."""
    shape = (10, 6, 30, 31) if streamed else (4, 6, 5, 7)
    big = torch.randn(shape[0], 2 * shape[1], shape[2], shape[3] + 3, device=DEVICE)
    tensors = {
        "gaps": big[:, ::2, :, 2:-1],
        "channels first": big[:, : shape[1], :, :-3].contiguous(),
        "channels last": big[:, : shape[1], :, :-3].contiguous(memory_format=torch.channels_last),
        "turned": torch.randn(shape[::-1], device=DEVICE).permute(3, 2, 1, 0),
        "expanded": torch.randn(1, 1, 1, 1, device=DEVICE).expand(shape),
    }
    for name, x in tensors.items():
        for other in ("gaps", "channels last", "expanded") if not streamed else ("turned",):
            residual = tensors[other]
            before = [t.clone() for t in (x, residual)]
            leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_()]
            y, _ = batch_norm(leaves[0], axis=1, epsilon=1e-3, activation="leaky_relu", residual=leaves[1])
            gradients = torch.autograd.grad(y.sum(), leaves)  # of an expanded one
            x64, r64 = (t.double().requires_grad_() for t in before)
            z = torch.nn.functional.batch_norm(x64, None, None, training=True, eps=1e-3) + r64
            expected = torch.where(z > 0, z, 0.01 * z)
            wanted = torch.autograd.grad(expected.sum(), (x64, r64))
            assert y.stride() == torch.empty_like(x).stride() or name == "expanded"
            for found, exact in zip((y, *gradients), (expected, *wanted), strict=True):
                np.testing.assert_allclose(numpy(found), numpy(exact), rtol=0, atol=2e-5, err_msg=f"{name}, {other}")
            assert all(torch.equal(t, b) for t, b in zip((x, residual), before, strict=True))


def test_the_caller_keeps_what_is_theirs() -> None:
    x, gamma, residual = (
        torch.randn(40, 6, 5, device=DEVICE),
        torch.rand(6, device=DEVICE),
        torch.randn(40, 6, 5, device=DEVICE),
    )
    before = [t.clone() for t in (x, gamma, residual)]
    batch_norm(x, gamma, axis=1, activation="relu", residual=residual)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, gamma, residual), strict=True))
