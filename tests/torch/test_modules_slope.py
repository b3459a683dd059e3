"""An activation that one call brings."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from evennorm.errors import ArgumentError
from evennorm.torch import BatchNorm2d

X = torch.linspace(-3, 3, 2 * 3 * 4 * 4, dtype=torch.float64).sin().reshape(2, 3, 4, 4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [None, X.cos()])
@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_it_is_applied_last(slope: float, residual: torch.Tensor | None, training: bool) -> None:
    ours, theirs = (
        BatchNorm2d(3, dtype=torch.float64).train(training),
        nn.BatchNorm2d(3, dtype=torch.float64).train(training),
    )
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    y = ours(inputs[0], residual, slope=slope)
    expected = theirs(inputs[1]) if residual is None else theirs(inputs[1]) + residual
    expected = F.leaky_relu(expected, slope)
    for each in (y, expected):
        each.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_it_is_exported(slope: float) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchNorm2d(3, dtype=torch.float64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x, x, slope=slope)

    model = Model().eval()
    expected = F.leaky_relu(nn.BatchNorm2d(3, dtype=torch.float64).eval()(X) + X, slope)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), expected)


@pytest.mark.parametrize("training", [True, False])
def test_it_may_have_a_limit(training: bool) -> None:
    ours, theirs = (kind(3, dtype=torch.float64).train(training) for kind in (BatchNorm2d, nn.BatchNorm2d))
    for module in (ours, theirs):
        nn.init.constant_(module.weight, 8.0)
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    y, expected = ours(inputs[0], X.cos(), slope=0.0, limit=6.0), F.relu6(theirs(inputs[1]) + X.cos())
    assert (expected == 6).any()
    for each in (y, expected):
        each.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("given", [{"slope": 0.0, "limit": 5.0}, {"slope": 0.3, "limit": 6.0}, {"limit": 6.0}], ids=str)
def test_other_limits_are_refused(given: dict[str, float]) -> None:
    message = (
        "limit bounds the activation of a call from above: 6 beside slope=0, which is relu6, or none; received "
        f"slope={given.get('slope')} and limit={given['limit']}; apply any other bound to the result"
    )
    module = BatchNorm2d(3)
    for training in (True, False):
        with pytest.raises(ArgumentError) as caught:
            module.train(training)(X.float(), **given)
        assert str(caught.value) == message
    module(X.float(), slope=0.0, limit=6)


def test_a_module_that_has_an_activation_takes_no_other() -> None:
    with pytest.raises(ArgumentError) as caught:
        BatchNorm2d(3, activation="elu")(X.float(), slope=0.0)
    assert str(caught.value) == (
        "slope applies an activation in one call of a module that has none; received slope=0.0 and a module with "
        "activation='elu'; leave one of them out"
    )


def test_what_cannot_be_inverted_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"negative_slope must be above 0; received negative_slope=0.0"):
        BatchNorm2d(3, memory="inplace")(X.float(), slope=0.0)
