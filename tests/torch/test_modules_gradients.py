"""Derivatives: first and second, by autograd and torch.func, in float64; and a forward pass that is taken twice."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import evennorm.torch as ours
from tests.cases import CASES
from tests.contract import textbook
from tests.grids import pairwise
from tests.torch.reference import MODULES, array, channels_second, module_for

DOUBLE = {"dtype": torch.float64}

# Of torch, when its forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def drawn(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter, least in zip(module.parameters(), (0.5, -0.4), strict=False):
            parameter.copy_(torch.linspace(least, 1.0, parameter.numel()))
    return module


DIFFERENTIABLE = [
    case
    for case in CASES
    if "one value per channel" not in case.name and case.name not in ("vector", "variance below the smallest float32")
]


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_gradients_are_the_textbooks(case, activation) -> None:
    given = channels_second(case, case.make())
    given["x"] = np.nan_to_num(given["x"], nan=case.mean + 0.5)  # behind a mask, where nothing could be compared
    options = {"eps": case.epsilon, "activation": activation, "virtual_batch_size": case.group}
    module = module_for(given["x"], given["gamma"], given["beta"], torch.float32, **options)
    flat = type(case)(case.name, given["x"].shape, 1, group=case.group, epsilon=case.epsilon)
    arguments = (given["x"], given["gamma"], given["beta"], given["residual"], given["mask"])
    z = textbook.forward(flat, *arguments)
    dy = np.where(np.abs(z) > 1e-4, given["dy"], 0.0) if activation else given["dy"]  # at the kink rounding takes the side
    x, residual = (torch.tensor(given[name], dtype=torch.float32, requires_grad=True) for name in ("x", "residual"))
    y = module(x, residual, mask=None if given["mask"] is None else torch.tensor(given["mask"]))
    got = torch.autograd.grad(y, (x, module.weight, module.bias, residual), torch.tensor(dy, dtype=torch.float32))
    for a, b in zip(got, textbook.backward(flat, dy, *arguments, activation=activation), strict=True):
        np.testing.assert_allclose(array(a), b.reshape(a.shape), rtol=0, atol=1e-5 * max(1.0, np.abs(b).max(initial=0.0)))


VARIANTS = [
    {},
    {"activation": "relu"},
    {"activation": "relu6"},
    {"activation": "leaky_relu", "virtual_batch_size": 3},
    {"activation": "elu", "alpha": 1.3},
    {"momentum": None},
    {"track_running_stats": False},
]


@pytest.mark.parametrize(
    *pairwise(shape=[(6, 3), (6, 3, 4), (6, 3, 2, 2), (6, 3, 2, 1, 2)], options=VARIANTS, training=[True, False])
)
def test_gradcheck_and_gradgradcheck(shape, options, training) -> None:
    torch.manual_seed(3)
    module = drawn(MODULES[len(shape)](3, eps=1e-2, **DOUBLE, **options)).train(training)
    x, residual = (torch.randn(shape, **DOUBLE, requires_grad=True) for _ in range(2))

    def run(x, residual, weight, bias):
        return functional_call(module, {"weight": weight, "bias": bias}, (x, residual))

    given = (x, residual, *(p.detach().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_around_a_mask(training: bool) -> None:
    torch.manual_seed(3)
    module = drawn(ours.BatchNorm1d(3, **DOUBLE, activation="leaky_relu")).train(training)
    x, mask = torch.randn(5, 3, 4, **DOUBLE, requires_grad=True), torch.rand(5, 4) < 0.7
    assert torch.autograd.gradcheck(lambda x: module(x, mask=mask), x)
    assert torch.autograd.gradgradcheck(lambda x: module(x, mask=mask), x)


def both(make):
    """The same from a module of torch and from ours; `make` has the library."""
    results = []
    for library in (nn, ours):
        torch.manual_seed(0)
        results.append(make(library))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_functional_transforms(training: bool) -> None:
    def module(library):
        return drawn(library.BatchNorm1d(3, **DOUBLE, track_running_stats=not training)).train(training)

    x, t = torch.randn(2, 4, 3, **DOUBLE)
    both(lambda library: jvp(lambda x: module(library)(x) ** 3, (x,), (t,)))
    both(lambda library: jacrev(lambda x: module(library)(x) ** 3)(x))
    both(lambda library: hessian(lambda x: (module(library)(x) ** 3).sum())(x))
    both(lambda library: vmap(module(library))(torch.stack([x, t])))
    both(lambda library: vmap(grad(lambda x: (module(library)(x) ** 3).sum()))(torch.stack([x, t])))


@pytest.mark.parametrize("training", [True, False])
def test_forward_mode(training: bool) -> None:
    """Nothing of the tangent is lost, also where no gradient is asked for."""

    def tangent(library):
        module = drawn(library.BatchNorm1d(3, **DOUBLE)).train(training)
        with torch.no_grad(), forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(*torch.randn(2, 4, 3, **DOUBLE)))).tangent

    both(tangent)


def test_a_functional_call_updates_the_statistics_it_is_given() -> None:
    def run(library):
        module = drawn(library.BatchNorm1d(3, **DOUBLE))
        state = {key: value.detach().clone() for key, value in module.state_dict().items()}
        y = functional_call(module, state, (torch.randn(4, 3, **DOUBLE),))
        assert not module.running_mean.any()
        return y, state

    both(run)


def test_a_gradient_by_parameters_with_statistics_as_arguments() -> None:
    def run(library):
        module = drawn(library.BatchNorm1d(3, **DOUBLE))
        buffers = {key: value.clone() for key, value in module.named_buffers()}

        def loss(parameters, buffers, x):
            return (functional_call(module, {**parameters, **buffers}, (x,)) ** 3).sum()

        gradients = grad(loss)(dict(module.named_parameters()), buffers, torch.randn(4, 3, **DOUBLE))
        return gradients, {key: buffers[key] for key in ("running_mean", "running_var", "num_batches_tracked")}

    both(run)


def test_an_ensemble() -> None:
    """Several models at once, each with statistics of its own, which are updated."""

    def run(library):
        models = [drawn(library.BatchNorm1d(3, **DOUBLE)) for _ in range(4)]
        parameters, buffers = stack_module_state(models)
        base = copy.deepcopy(models[0]).to("meta")
        y = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(parameters, buffers, torch.randn(4, 5, 3, **DOUBLE))
        return y, buffers["running_mean"], buffers["num_batches_tracked"]

    both(run)


def test_statistics_that_are_not_mapped_are_refused() -> None:
    """As by torch's modules, and before anything is written."""
    module = ours.BatchNorm1d(3)
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(module)(torch.randn(2, 4, 3))
    assert not module.running_mean.any()
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        grad(lambda x: module(x).sum())(torch.randn(4, 3))
    assert int(module.num_batches_tracked) == 0


@pytest.mark.parametrize("memory", ["save", "inplace"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_statistics_are_updated_once(use_reentrant: bool, memory: str) -> None:
    """torch's own are updated twice, once more when the backward pass repeats the forward pass."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 1)
    modules = [ours.BatchNorm2d(4, activation="leaky_relu", memory=memory) for _ in range(2)]
    results = []
    for module, repeated in zip(modules, (False, True), strict=True):
        x = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()

        def block(x, module=module):
            return module(conv(x)).tanh()

        y = checkpoint(block, x, use_reentrant=use_reentrant) if repeated else block(x)
        gradients = torch.autograd.grad(y.square().sum(), (conv.weight, *module.parameters())) if not use_reentrant else None
        if use_reentrant:
            conv.zero_grad()
            y.square().sum().backward()
            gradients = [p.grad.clone() for p in (conv.weight, *module.parameters())]
        results.append((y.detach(), gradients, dict(module.named_buffers())))
    torch.testing.assert_close(list(results[1][1]), list(results[0][1]), rtol=0, atol=0)
    torch.testing.assert_close(results[1][2], results[0][2], rtol=0, atol=0)
    assert int(modules[1].num_batches_tracked) == 1


def test_a_new_step_after_backward_is_followed_again() -> None:
    module = ours.BatchNorm1d(3)
    for _ in range(3):
        checkpoint(module, torch.randn(4, 3, requires_grad=True), use_reentrant=False).sum().backward()
    assert int(module.num_batches_tracked) == 3


def test_statistics_that_change_between_forward_and_backward() -> None:
    """An inference pass is differentiated by the statistics it has seen, whatever training does to them meanwhile."""
    module = drawn(ours.BatchNorm1d(3, **DOUBLE))
    module(torch.randn(8, 3, **DOUBLE) * 2 + 1)
    x = torch.randn(4, 3, **DOUBLE, requires_grad=True)
    scale = module.weight / torch.sqrt(module.running_var + module.eps)
    y = module.eval()(x)
    module.train()(torch.randn(8, 3, **DOUBLE) * 9)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, scale.detach().expand(4, 3), rtol=1e-12, atol=0)


def test_parameters_of_half_precision_get_gradients_of_it() -> None:
    module = drawn(ours.BatchNorm1d(3).half())
    module(torch.randn(4, 3).half()).square().sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float16}
