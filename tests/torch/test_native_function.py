"""The extension for torch gives `batch_norm` the same bits as the way through Python, moments and their gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evennorm.torch import batch_norm, engine, native
from tests.torch.native_calls import through_python, watched

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason="built without the extension for this torch")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    return watched(monkeypatch, "batch_norm")


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def in_layout(x: Tensor, order: list[int]) -> Tensor:
    return x.permute(order).contiguous().permute([order.index(a) for a in range(x.ndim)])


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from((None, "relu", "relu6", "leaky_relu")),
    affine=st.booleans(),
    has_residual=st.booleans(),
    through=st.sampled_from(("y", "moments", "both", "variance")),
)
def test_the_same_bits_as_through_python(
    sizes: list[int],
    data: st.DataObject,
    dtype: torch.dtype,
    activation: str | None,
    affine: bool,
    has_residual: bool,
    through: str,
) -> None:
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    x, residual, dy = (
        in_layout(torch.randn(sizes, generator=generator).to(dtype), data.draw(st.permutations(range(len(sizes)))))
        for _ in range(3)
    )
    rows = [torch.randn(sizes[axis], generator=generator, dtype=wide(dtype)) for _ in range(4)]

    def results() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, *(rows[:2] if affine else ()), *([residual] * has_residual))]
        parameters = leaves[1:3] if affine else (None, None)
        options: dict[str, Any] = {"axis": axis, "activation": activation, "residual": leaves[-1] if has_residual else None}
        y, m = batch_norm(leaves[0], *parameters, **options)
        assert not m.mean.requires_grad
        weighed = {"y": (y.double() * dy).sum(), "variance": (m.variance * rows[3]).sum()}
        weighed["moments"] = ((m.mean + m.mean_low) * rows[2]).sum() + weighed["variance"]
        weighed["both"] = weighed["y"] + weighed["moments"]
        gradients = torch.autograd.grad(weighed[through], leaves, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            again, n = batch_norm(leaves[0], *parameters, **options)
        assert m.count == n.count == x.numel() // sizes[axis]
        return [y, *m[1:], again, *n[1:], *gradients]

    for one, other in zip(results(), through_python(results), strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(one, other)


@pytest.mark.parametrize("grouped", [False, True])
def test_moments_have_the_shape_that_was_asked_for(grouped: bool, served: list[bool]) -> None:
    x = torch.randn(6, 3, requires_grad=True)
    call = engine._call(x, -1)
    found, expected = (
        run(lambda: engine.train(call, x, None, None, grouped=grouped))[1] for run in (lambda f: f(), through_python)
    )
    assert served == [True]
    assert [t.shape for t in found[1:]] == [t.shape for t in expected[1:]] == [(1, 3) if grouped else (3,)] * 3
    for moments in (found, expected):
        (moments.variance * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.autograd.grad((x.var(0, False) * torch.tensor([1.0, 2, 3])).sum(), x)[0])


class Kind(Tensor):
    """A subclass, which may mean anything."""


UNUSUAL: dict[str, tuple[dict[str, Any], bool]] = {
    "a mask": ({"mask": torch.arange(6) > 1}, False),
    "ghost batches": ({"virtual_batch_size": 3}, False),
    "several axes": ({"axis": (0, 1), "gamma": None, "beta": None}, False),
    "parameters of another dtype": ({"gamma": torch.ones(3, dtype=torch.float64)}, True),
    "a residual of another dtype": ({"residual": torch.ones(6, 3, dtype=torch.float64)}, True),
    "a subclass": ({"x": torch.randn(6, 3).as_subclass(Kind)}, True),
    "a lazy negative": ({"x": torch.randn(6, 3, dtype=torch.complex64).conj().imag}, True),
    "no values": ({"x": torch.zeros(0, 3)}, True),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_handed_back(name: str, served: list[bool]) -> None:
    change, is_asked = UNUSUAL[name]
    given = {"x": torch.randn(6, 3), "gamma": torch.ones(3), "beta": torch.zeros(3), "activation": "relu"} | change
    y, moments = batch_norm(**given)
    assert served == [False] * is_asked
    expected, of_python = through_python(lambda: batch_norm(**given))
    assert torch.equal(y, expected)
    assert torch.equal(moments.variance, of_python.variance)


def test_errors_are_those_of_python() -> None:
    x = torch.randn(6, 3)
    for wrong in ({"gamma": torch.ones(4)}, {"residual": torch.ones(6, 1)}, {"axis": 2}, {"activation": "tanh"}):
        messages = []
        for run in (lambda f: f(), through_python):
            with pytest.raises(ValueError, match=r"\w") as raised:
                run(lambda: batch_norm(x, **wrong))  # noqa: B023
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


def test_derivatives_of_second_order() -> None:
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    gamma = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def results(x: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
        y, m = batch_norm(x, gamma, activation="leaky_relu", residual=x.sin())
        return y, m.mean + m.mean_low, m.variance

    assert torch.autograd.gradcheck(results, (x, gamma))
    assert torch.autograd.gradgradcheck(results, (x, gamma))


def test_moments_may_be_written() -> None:
    """As a caller does who keeps running averages in place."""
    x = torch.randn(8, 3, requires_grad=True)
    y, m = batch_norm(x)
    with torch.no_grad():
        m.mean.zero_(), m.mean_low.zero_(), m.variance.zero_()
    torch.testing.assert_close(*(torch.autograd.grad((f * x.detach() ** 2).sum(), x)[0] for f in (y, batch_norm(x)[0])))


@pytest.mark.parametrize("through", ["y", "both", "variance"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, of any graph
def test_under_compiled_autograd(through: str, backend: str) -> None:
    for size in (6, 8):
        x, gamma = torch.randn(size, 3, requires_grad=True), torch.rand(3, requires_grad=True)

        def loss() -> Tensor:
            y, m = batch_norm(x, gamma, activation="relu")  # noqa: B023
            parts = {"y": (y**2).sum(), "variance": m.variance.square().sum()}
            return parts["y"] + parts["variance"] + m.mean_low.sum() if through == "both" else parts[through]

        expected = torch.autograd.grad(loss(), (x, gamma), materialize_grads=True, allow_unused=True)
        again = loss()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend)):
            again.backward()
        torch.testing.assert_close(x.grad, expected[0])
        torch.testing.assert_close(torch.zeros(3) if gamma.grad is None else gamma.grad, expected[1])


def test_saved_tensors_pass_their_hooks() -> None:
    packed: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    x = torch.randn(6, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = batch_norm(x, torch.ones(3))
    assert sorted(packed) == [(3,), (3, 1, 3), (6, 3)]
    y.sum().backward()


def test_is_finite_where_it_can_be_seen() -> None:
    is_finite = native.extension.is_finite
    for dtype in (torch.float32, torch.float64):
        ones = torch.ones(37, dtype=dtype)
        assert is_finite(ones)
        assert is_finite(ones.clone().requires_grad_())
        for at in (0, 36):
            for bad in (float("inf"), float("-inf"), float("nan")):
                assert not is_finite(ones.index_fill(0, torch.tensor([at]), bad))
    assert is_finite(torch.zeros(0))
    for unknown in (None, 1.0, torch.ones(4)[::2], torch.ones(3, dtype=torch.float16), torch.ones(3, device="meta")):
        assert not is_finite(unknown)
