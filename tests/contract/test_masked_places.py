"""What a mask hides acts on nothing, not even as 0 * NaN: gradients are those of a batch with something finite there."""

from __future__ import annotations

import numpy as np
import pytest

from evennorm.numpy import batch_norm, batch_norm_gradient
from tests.cases import CASES, Case
from tests.contract import textbook
from tests.contract.engines import ENGINES
from tests.grids import pairwise

MASKED = [case for case in CASES if case.mask not in (None, "all masked")]
DIFFERENTIABLE = ("jax jit", "torch", "tensorflow", "tensorflow function, unknown sizes", "tensorflow xla")


def hidden_and_plain(case: Case, value: float, derivative: float) -> tuple[dict, list[np.ndarray]]:
    """Arrays with `value` and `derivative` behind the mask, and the derivatives of those with a mean and 0 there."""
    arrays = case.make()
    hidden = ~case.full_mask(arrays["mask"])
    plain = {**arrays, "x": np.where(hidden, case.mean + 0.5, arrays["x"]), "dy": np.where(hidden, 0.0, arrays["dy"])}
    expected = list(textbook.backward(case, **plain, activation="relu"))
    arrays["x"], arrays["dy"] = np.where(hidden, value, arrays["x"]), np.where(hidden, derivative, arrays["dy"])
    z = textbook.forward(case, **{k: plain[k] for k in ("x", "gamma", "beta", "residual", "mask")})
    near = ~hidden & (np.abs(z) <= 1e-4)  # at the kink the side is a matter of rounding
    assert not near.any()
    return arrays, [np.where(hidden, 0.0, expected[0]), *expected[1:]]


def compare(case: Case, arrays: dict, got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    counts = case.full_mask(arrays["mask"])
    for name, a, b in zip(("x", "gamma", "beta", "residual"), got, expected, strict=True):
        a = np.asarray(a, np.float64).reshape(b.shape)
        if name == "x":  # through what is hidden and finite the gradient of a constant normalization goes
            a, b = np.where(counts, a, 0.0), np.where(counts, b, 0.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max()), err_msg=f"derivative by {name}")


@pytest.mark.parametrize(
    *pairwise(
        engine=DIFFERENTIABLE,
        case=[c for c in MASKED if c.name in ("mask over time", "mask per element")],
        hidden=[(np.nan, 0.0), (np.nan, np.nan), (-np.inf, 0.0), (np.inf, np.nan)],
    )
)
def test_gradients(engine: str, case: Case, hidden: tuple[float, float]) -> None:
    """A loss that is masked too has the derivative 0 there; or NaN, where it squares before it selects."""
    value, derivative = hidden
    arrays, expected = hidden_and_plain(case, value, derivative)
    compare(case, arrays, ENGINES[engine].backward(case, arrays, "float32", activation="relu"), expected)


@pytest.mark.parametrize(("value", "derivative"), [(np.nan, 0.0), (np.nan, np.nan), (np.inf, 0.0)])
@pytest.mark.parametrize("case", MASKED, ids=str)
def test_gradients_on_numpy(case: Case, value: float, derivative: float) -> None:
    arrays, expected = hidden_and_plain(case, value, derivative)
    dy = arrays.pop("dy")
    options = {"axis": case.axis, "epsilon": case.epsilon, "virtual_batch_size": case.group, "activation": "relu"}
    _, moments = batch_norm(**arrays, **options)
    compare(case, arrays, list(batch_norm_gradient(dy, moments=moments, **arrays, **options)), expected)


def test_second_derivatives() -> None:
    """A gradient penalty over what counts."""
    import torch

    from evennorm.torch.backend import batch_norm

    rng = np.random.default_rng(3)
    mask = torch.tensor(rng.random((6, 7)) < 0.6)
    x = torch.tensor(rng.normal(size=(6, 7, 3)))

    def penalty(x: torch.Tensor) -> torch.Tensor:
        y, _ = batch_norm(x, mask=mask)
        (first,) = torch.autograd.grad(torch.where(mask[..., None], y**3, 0).sum(), x, create_graph=True)
        return torch.where(mask[..., None], first**2, 0).sum()

    found = []
    for value in (0.5, torch.nan):
        given = torch.where(mask[..., None], x, value).requires_grad_()
        found.append(torch.autograd.grad(penalty(given), given)[0][mask])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9, atol=1e-12)
    assert found[0].abs().max() > 0.01


@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over forward"])
def test_hessians_on_torch(mode: str) -> None:
    """In forward mode torch differentiates the formulas themselves."""
    import torch

    from evennorm.torch.backend import batch_norm

    mask = torch.tensor([[True], [True], [True], [False]])
    x = torch.tensor([[1.0], [2.0], [4.0], [torch.nan]], dtype=torch.float64)

    def loss(gamma: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, batch_norm(x, gamma, mask=mask[:, 0])[0] ** 3, 0).sum()

    second = (
        torch.func.jacfwd(torch.func.grad(loss))
        if mode == "forward over reverse"
        else torch.func.grad(lambda gamma: torch.func.jvp(loss, (gamma,), (torch.ones_like(gamma),))[1])
    )
    xhat = (x[:3, 0] - x[:3, 0].mean()) / torch.sqrt(x[:3, 0].var(correction=0) + 1e-5)
    gamma = torch.tensor([1.5], dtype=torch.float64)
    np.testing.assert_allclose(second(gamma).ravel(), [float(6 * 1.5 * (xhat**3).sum())], rtol=1e-9)


@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over forward", "reverse over reverse"])
def test_hessians_on_jax(mode: str) -> None:
    import jax
    import jax.numpy as jnp

    from evennorm.jax import batch_norm

    mask = np.array([[True], [True], [True], [False]])
    second, first = mode.split(" over ")

    def loss(x: jax.Array) -> jax.Array:
        return jnp.where(mask, batch_norm(x, epsilon=1.0, mask=mask[:, 0])[0] ** 3, 0.0).sum()

    inner = jax.grad if first == "reverse" else jax.jacfwd
    outer = jax.jacfwd if second == "forward" else jax.jacrev
    found = [
        np.asarray(outer(inner(loss))(np.array([[1.0], [2.0], [4.0], [hidden]], "float32"))).reshape(4, 4)[:3, :3]
        for hidden in (0.5, np.nan)
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert np.abs(found[0]).max() > 0.01
