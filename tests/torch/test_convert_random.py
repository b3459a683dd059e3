"""Programs drawn at random, some of them writing in place, give the same outputs, inputs, statistics and gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from evennorm.torch import convert, report
from tests.grids import mostly


class Program(nn.Module):
    """Straight-line code: each instruction makes a value out of one or two that are there."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        draw = random.Random(seed)
        self.norms = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(3))
        self.chains = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.BatchNorm2d(2)),
                nn.Sequential(nn.ReLU(inplace=True), nn.Sequential(nn.Identity(), nn.BatchNorm2d(2))),
            ]
        )
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.relu, self.relu_, self.leaky = nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.3)
        self.identity = nn.Identity()
        count = draw.randint(4, 9)
        names = draw.choices([*_ONE, *_TWO], [*_ONE_WEIGHTS, *_TWO_WEIGHTS], k=count)
        # Mostly of values that are new, so that chains of operations come about.
        self.code = [
            (name, max(0, done - draw.choice((0, 0, 0, 1, 2))), draw.randint(0, done)) for done, name in enumerate(names)
        ]
        self.results = sorted({count, draw.randint(0, count)})

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for name, one, two in self.code:
            values.append(_ONE[name](self, values[one]) if name in _ONE else _TWO[name](values[one], values[two]))
        return [values[place] for place in self.results]


def _added_in_place(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


_ONE: dict[str, Any] = {
    "norm 0": lambda m, x: m.norms[0](x),
    "norm 1": lambda m, x: m.norms[1](x),
    "norm 2": lambda m, x: m.norms[2](x),
    "chain 0": lambda m, x: m.chains[0](x),
    "chain 1": lambda m, x: m.chains[1](x),
    "conv": lambda m, x: m.conv(x),
    "relu": lambda m, x: m.relu(x),
    "relu in place": lambda m, x: m.relu_(x),
    "leaky": lambda m, x: m.leaky(x),
    "function": lambda m, x: F.relu(x),
    "function in place": lambda m, x: F.relu_(x),
    "identity": lambda m, x: m.identity(x),
    "view": lambda m, x: x.flatten(2).view(x.shape),
    "scaled in place": lambda m, x: x.mul_(0.5),
}
_ONE_WEIGHTS = [6, 6, 4, 4, 4, 3, 4, 4, 2, 4, 2, 3, 2, 2]
_TWO: dict[str, Any] = {"sum": lambda a, b: a + b, "sum in place": _added_in_place, "torch.add": torch.add}
_TWO_WEIGHTS = [8, 5, 2]


def run(model: nn.Module, training: bool, gradients: bool) -> list[Tensor]:
    model.train(training)
    x = torch.linspace(-2, 2, 3 * 2 * 4 * 4, dtype=torch.float64).sin().reshape(3, 2, 4, 4).requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        inside = x * 1.0
        results = model(inside)
    if not gradients:
        return [*results, inside]
    sum((y * (place + 1)).square().sum() for place, y in enumerate(results)).backward()
    found = [*(y.detach() for y in results), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


def fails(model: nn.Module) -> bool:
    """Whether autograd refuses the program, for what it writes to."""
    try:
        run(model, True, True)
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize(*mostly(lambda first: first == 0, "first", [(0,), (50,), (100,)]))
def test_random_programs(first: int) -> None:
    fused = differentiated = 0
    for seed in range(first, first + 50):
        model = Program(seed).double()
        ours = convert(model)
        fused += sum(bool(layer.steps) for layer in report(ours).layers if layer.name.startswith("norms"))
        gradients = not fails(Program(seed).double())
        differentiated += gradients
        for training, with_gradients in ((True, False), (False, False), (True, gradients), (False, False)):
            expected = run(model, training, with_gradients)
            for mine, theirs in zip(run(ours, training, with_gradients), expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, msg=lambda text, seed=seed: f"{seed}: {text}")
        for (key, mine), theirs in zip(ours.state_dict().items(), model.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, msg=f"{seed}: {key}")
    assert fused >= 3, fused
    assert differentiated >= 3, differentiated
