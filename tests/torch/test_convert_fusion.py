"""Which steps are computed together, which are not and why; and that both ways give the same."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from evennorm.core.activation import RELU, RELU6, Activation
from evennorm.torch import convert, report
from evennorm.torch.conversion.steps import normalized

X = torch.linspace(-3, 3, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8).sin()
SEEN: list[Any] = []


class Model(nn.Module):
    """All that the functions below call."""

    def __init__(self, body: Callable[[Model, Tensor], Any]):
        super().__init__()
        torch.manual_seed(0)
        self.bn, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.conv, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.relu, self.relu_, self.leaky = nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.1)
        self.relu6, self.relu6_ = nn.ReLU6(), nn.ReLU6(inplace=True)
        self.hardtanh, self.narrow = nn.Hardtanh(0, 6), nn.Hardtanh(0, 5)
        self.chain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
        self.inplace_chain = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))
        self.identity = nn.Identity()
        self.gain = nn.Parameter(torch.full((3, 1, 1), 0.5))
        self.register_buffer("offset", torch.full((3, 1, 1), 0.25))
        self.flag, self.kept, self.notes = True, 0, []
        self.body = [body]
        nn.init.normal_(self.bn.weight, 0.0, 4.0)
        nn.init.normal_(self.bn.bias)

    def forward(self, x: Tensor) -> Any:
        return self.body[0](self, x)


def outputs(model: nn.Module, training: bool, gradients: bool) -> list[Tensor]:
    torch.manual_seed(1)
    x = X.clone().requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        y = model.train(training)(x * 1)
    y = y[0] if isinstance(y, tuple) else y
    if not gradients:
        return [y]
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


def assert_same(body: Callable[[Any, Tensor], Any], gradients: bool = True) -> nn.Module:
    model = Model(body)
    ours = convert(model)
    for training in (True, False, True):
        expected = outputs(model, training, gradients)
        for mine, theirs in zip(outputs(ours, training, gradients), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
    for (key, mine), theirs in zip(ours.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=key)
    return ours


@pytest.fixture(autouse=True)
def _double() -> Any:
    global X
    before, X = X, X.double()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    X = before
    SEEN.clear()


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    y += x
    return m.relu_(y)


def in_place_twice(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    return y.add_(x).relu_()


def both_normalized(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn(x) + m.other(m.conv(x)))


def sequential_before(m: Any, x: Tensor) -> Tensor:
    y = m.chain(x)
    z = m.other(m.conv(x))
    return F.relu(z + y)


def shortcut_drawn_in_between(m: Any, x: Tensor) -> Tensor:
    y = F.dropout(m.conv(x), 0.5, m.training)
    y = m.bn(y)
    z = F.dropout(x, 0.5, m.training)
    return (y + z).relu()


def other_relu_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    z = m.relu_(m.conv2(x))
    return m.relu_(y + z)


def chained(m: Any, x: Tensor) -> Tensor:
    y = m.relu(m.bn(x))
    z = m.other(m.conv(y))
    return m.relu(z + y)


def modes(m: Any, x: Tensor) -> Tensor:
    if m.training:
        return F.relu(m.bn(x) + x)
    return F.leaky_relu(m.bn(x))


def guarded(m: Any, x: Tensor) -> Tensor:
    try:
        scale = 1.0 if x.shape == X.shape else 2.0
    except ValueError:
        scale = 3.0
    return m.relu(m.bn(x)) * scale


TOGETHER: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, str]]] = {
    "module": (lambda m, x: m.relu(m.bn(x)), {"bn": "relu"}),
    "module in place": (lambda m, x: m.relu_(m.bn(x)), {"bn": "relu"}),
    "leaky module": (lambda m, x: m.leaky(m.bn(x)), {"bn": "leaky_relu"}),
    "functions": (lambda m, x: F.relu(torch.relu(m.bn(x)) + torch.relu_(m.other(x))), {"bn": "relu", "other": "relu"}),
    "function in place": (lambda m, x: F.relu(m.bn(x), inplace=True), {"bn": "relu"}),
    "function in place by position": (lambda m, x: F.relu(m.bn(x), True), {"bn": "relu"}),
    "methods": (lambda m, x: m.bn(x).relu() + m.other(x).relu_(), {"bn": "relu", "other": "relu"}),
    "leaky functions": (
        lambda m, x: F.leaky_relu(m.bn(x)) + F.leaky_relu_(m.other(x), 0.3),
        {"bn": "leaky_relu", "other": "leaky_relu"},
    ),
    "leaky by keyword": (lambda m, x: F.leaky_relu(m.bn(x), negative_slope=1, inplace=True), {"bn": "leaky_relu"}),
    "a new module": (lambda m, x: nn.LeakyReLU(0.3, True)(m.bn(x)), {"bn": "leaky_relu"}),
    "relu6 modules": (lambda m, x: m.relu6_(m.bn(x)) + m.relu6(m.other(x)), {"bn": "relu6", "other": "relu6"}),
    "relu6 functions": (
        lambda m, x: F.relu6(m.bn(x)) + F.relu6(m.other(x), True),
        {"bn": "relu6", "other": "relu6"},
    ),
    "hardtanh functions": (
        lambda m, x: F.hardtanh(m.bn(x), 0, 6.0) + F.hardtanh_(m.other(x), max_val=6, min_val=0.0),
        {"bn": "relu6", "other": "relu6"},
    ),
    "relu6 after a sum": (lambda m, x: m.relu6(m.bn(m.conv(x)) + 8 * x), {"bn": "add + relu6"}),
    "hardtanh as relu6": (lambda m, x: m.hardtanh(m.bn(m.conv(x)) + 8 * x), {"bn": "add + relu6"}),
    "a new relu6": (lambda m, x: nn.ReLU6(True)(m.bn(x)), {"bn": "relu6"}),
    "plus": (lambda m, x: m.relu(m.bn(m.conv(x)) + x), {"bn": "add + relu"}),
    "plus, other side": (lambda m, x: m.relu(x + m.bn(m.conv(x))), {"bn": "add + relu"}),
    "operator": (lambda m, x: m.relu(operator.add(m.bn(m.conv(x)), x)), {"bn": "add + relu"}),
    "torch.add": (lambda m, x: m.relu(torch.add(m.bn(m.conv(x)), x, alpha=1)), {"bn": "add + relu"}),
    "method add": (lambda m, x: m.leaky(x.add(m.bn(m.conv(x)))), {"bn": "add + leaky_relu"}),
    "in place": (in_place, {"bn": "add + relu"}),
    "in place twice": (in_place_twice, {"bn": "add + relu"}),
    "no activation": (lambda m, x: m.bn(m.conv(x)) + x, {"bn": "add"}),
    "sum read twice": (lambda m, x: (lambda y: m.relu(y) + y)(m.bn(m.conv(x)) + x), {"bn": "add"}),
    "both normalized": (both_normalized, {"other": "add + relu"}),
    "sequential before": (sequential_before, {"other": "add + relu"}),
    "end of a Sequential": (lambda m, x: F.relu(m.chain(x) + x), {"chain.1.1": "add + relu"}),
    "end of a Sequential, no sum": (lambda m, x: m.relu(m.chain(x)), {"chain.1.1": "relu"}),
    "a part of a Sequential": (lambda m, x: m.relu(m.chain[1](x) + x), {"chain.1.1": "add + relu"}),
    "called in two ways": (lambda m, x: m.bn(m.conv(m.bn(x).relu())), {"bn": "relu"}),
    "shortcut with dropout": (shortcut_drawn_in_between, {"bn": "add + relu"}),
    "ReLU in place in between": (other_relu_in_place, {"bn": "add + relu"}),
    "one after the other": (chained, {"bn": "relu", "other": "add + relu"}),
    "parameter": (lambda m, x: m.relu(m.bn(x) + m.gain), {"bn": "add + relu"}),
    "buffer": (lambda m, x: m.relu(m.bn(x) + m.offset) * m.offset, {"bn": "add + relu"}),
    "functional dropout": (lambda m, x: F.dropout(m.relu(m.bn(x)), 0.5, m.training), {"bn": "relu"}),
    "by mode": (modes, {"bn": "add + relu"}),
    "several outputs": (lambda m, x: (m.relu(m.bn(x)), {"x": x}), {"bn": "relu"}),
    "sizes": (lambda m, x: m.relu(m.bn(x)).view(x.size(0), -1), {"bn": "relu"}),
    "nothing in between": (lambda m, x: m.leaky(m.identity(m.bn(x))), {"bn": "leaky_relu"}),
    "nothing before the sum": (lambda m, x: F.relu(m.identity(m.identity(m.chain(x))) + x), {"chain.1.1": "add + relu"}),
    "flag": (lambda m, x: m.relu(m.bn(x)) if m.flag else x, {"bn": "relu"}),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_together(name: str) -> None:
    body, expected = TOGETHER[name]
    ours = assert_same(body)
    assert {layer.name: " + ".join(layer.steps) for layer in report(ours).layers if layer.steps} == expected


def test_the_fused_step_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the module's own code."""
    for name, (body, _) in TOGETHER.items():
        if name in ("no activation", "sum read twice", "by mode", "ReLU in place in between", "parameter", "buffer"):
            continue
        ours = convert(Model(body))
        for module in (ours.relu, ours.relu_, ours.leaky, ours.relu6, ours.relu6_):
            monkeypatch.setattr(module, "_call_impl", partial(_fail, f"{name} calls an activation"))
        ours.body[0] = partial(_fail, f"{name} runs its own code")
        ours(X)


def _fail(message: str, *_: Any) -> None:
    pytest.fail(message)


def later_write(m: Any, x: Tensor) -> Tensor:
    y = m.bn(x)
    x.mul_(2)
    return m.relu(y + x)


def later_write_by_a_module(m: Any, x: Tensor) -> Tensor:
    y = m.bn(x)
    return m.relu(y + m.inplace_chain(x))


def later_write_by_a_function(m: Any, x: Tensor) -> Tensor:
    y = m.bn(x)
    z = F.relu(x, inplace=True)
    return m.relu(y + z)


def later_write_through_a_view(m: Any, x: Tensor) -> Tensor:
    x = m.conv(x)
    y = m.bn(x)
    x.flatten(1).mul_(2)
    return m.relu(y + m.conv2(x))


def same_layer_in_between(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    return m.relu(y + m.bn(x).sigmoid())


def into_the_shortcut(m: Any, x: Tensor) -> Tensor:
    z = m.conv2(x) * 1
    z += m.bn(m.conv(x))
    return m.relu(z)


APART: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "nothing follows": (lambda m, x: m.bn(x), "its output is returned"),
    "convolution follows": (lambda m, x: m.conv(m.bn(x)), "conv (Conv2d) follows"),
    "function follows": (lambda m, x: torch.tanh(m.bn(x)), "tanh follows"),
    "method follows": (lambda m, x: m.bn(x).tanh(), "tanh follows"),
    "read twice": (lambda m, x: (lambda y: y.relu() + y.tanh())(m.bn(x)), "its output is read by 2 others"),
    "added to itself": (lambda m, x: (lambda y: (y + y).relu())(m.bn(x)), "add follows"),
    "a number": (lambda m, x: (m.bn(x) + 1).relu(), "add follows"),
    "scaled": (lambda m, x: torch.add(m.bn(m.conv(x)), x, alpha=2).relu(), "add follows"),
    "difference": (lambda m, x: (m.bn(m.conv(x)) - x).relu(), "sub follows"),
    "slope that is a value": (lambda m, x: F.leaky_relu(m.bn(x), 0.1 * x.shape[1]), "leaky_relu follows"),
    "other ends": (lambda m, x: m.narrow(m.bn(x)), "narrow (Hardtanh) follows"),
    "other ends of a function": (lambda m, x: F.hardtanh(m.bn(x)), "hardtanh follows"),
    "clamp, whose gradient passes at its ends": (lambda m, x: m.bn(x).clamp(0, 6), "clamp follows"),
    "written into the shortcut": (into_the_shortcut, "the sum is written over the other operand"),
    "input written later": (later_write, "mul_ comes in between and writes in place"),
    "input written later by a module": (later_write_by_a_module, "inplace_chain comes in between and writes in place"),
    "input written later by a function": (later_write_by_a_function, "relu comes in between and writes in place"),
    "input written through a view": (later_write_through_a_view, "mul_ comes in between and writes in place"),
    "used in between": (same_layer_in_between, "bn comes in between and uses the same modules"),
}


@pytest.mark.parametrize("name", APART)
def test_apart(name: str) -> None:
    body, reason = APART[name]
    ours = assert_same(body, gradients="written" not in name)  # autograd refuses what was written to
    layers = {layer.name: layer for layer in report(ours).layers}
    assert (layers["bn"].steps, layers["bn"].reason) == ((), reason)
    assert type(ours) is Model


def counts(m: Any, x: Tensor) -> Tensor:
    m.kept += 1
    return m.relu(m.bn(x))


def notes(m: Any, x: Tensor) -> Tensor:
    m.notes.append(1)
    return m.relu(m.bn(x))


def shows(m: Any, x: Tensor) -> Tensor:
    y = m.relu(m.bn(x))
    SEEN.append(y)
    return y


def without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.relu(m.bn(x))
    return y + x


def exact(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.relu(m.bn(x))


def mixed(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = m.conv(x)
    return m.relu(m.bn(x.to(torch.float64)))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g


def half_frozen(m: Any, x: Tensor) -> Tensor:
    y = m.bn(x)
    return m.relu(y) if m.bn.training else m.leaky(y)


def written_elements(m: Any, x: Tensor) -> Tensor:
    y = m.relu(m.bn(x))
    y[0] = 0
    return y


def named(m: Any, x: Tensor) -> Tensor:
    y = m.relu(m.bn(x))
    y.note = "kept"
    return y


BRANCHES = "depends on the modes of its submodules, on autocast or on whether gradients are recorded"
UNTRACEABLE: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "values decide": (lambda m, x: m.relu(m.bn(x)) if x.sum() > 0 else m.bn(x), "branches on a value"),
    "shapes decide": (lambda m, x: m.relu(m.bn(x)) if x.shape[0] > 1 else x, "branches on a value"),
    "loops over values": (lambda m, x: m.relu(sum(m.bn(y) for y in [*x[None]])), "iterates over a value"),
    "types decide": (lambda m, x: m.relu(m.bn(x)) if isinstance(x, Tensor) else x, "asks for the type of a value"),
    "submodules' modes decide": (half_frozen, BRANCHES),
    "gradient mode decides": (lambda m, x: m.relu(m.bn(x)) * (2 if torch.is_grad_enabled() else 1), BRANCHES),
    "counts": (counts, "sets self.kept"),
    "notes": (notes, "changes self.notes"),
    "shows": (shows, "keeps values beyond the call"),
    "no_grad": (without_gradient, "changes autocast, gradient mode or what is saved for backward"),
    "autocast off": (exact, "changes autocast, gradient mode or what is saved for backward"),
    "autocast on": (mixed, "changes autocast, gradient mode or what is saved for backward"),
    "checkpoint": (
        lambda m, x: checkpoint(lambda x: m.relu(m.bn(x)), x, use_reentrant=False),
        "changes autocast, gradient mode or what is saved for backward",
    ),
    "own gradient": (
        lambda m, x: Doubled.apply(m.relu(m.bn(x))),
        "changes autocast, gradient mode or what is saved for backward",
    ),
    "random": (lambda m, x: m.relu(m.bn(x)) * (1 if random.random() < 2 else 0), "draws random numbers"),
    "NumPy's random": (lambda m, x: m.relu(m.bn(x)) * (1 if np.random.rand() < 2 else 0), "draws random numbers"),
    "torch's random": (
        lambda m, x: m.relu(m.bn(x)) * (1 if torch.rand(1) < 2 else 0),
        "computes something that does not depend on its input (aten.rand.default)",
    ),
    "tensors of its own": (
        lambda m, x: m.relu(m.bn(x)) * torch.ones(3, 1, 1),
        "computes something that does not depend on its input (aten.ones.default)",
    ),
    "a tensor from elsewhere": (lambda m, x: m.relu(m.bn(x)) + X, "uses a tensor that is neither parameter nor buffer"),
    "an unregistered module": (
        lambda m, x: nn.Dropout(0.0)(m.relu(m.bn(x))),
        "calls a Dropout that is not registered in it",
    ),
    "elements written": (
        written_elements,
        "cannot be traced (TypeError: '_Proxy' object does not support item assignment)",
    ),
    "attributes of values": (named, "sets .note of a value"),
    "length": (
        lambda m, x: m.relu(m.bn(x)) * len(x),
        "cannot be traced (RuntimeError: 'len' is not supported in symbolic tracing by default. If you want this call to be "
        "recorded, please call torch.fx.wrap('len') at module scope)",
    ),
    "caught": (guarded, "branches on a value"),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_untraceable_code_is_left_alone(name: str) -> None:
    body, reason = UNTRACEABLE[name]
    model = Model(body)
    state = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    layers = report(convert(model)).layers
    assert (random.getstate(), str(np.random.get_state())) == state[:2]
    assert torch.equal(torch.get_rng_state(), state[2])
    assert SEEN == [] or name == "shows"
    assert (layers[0].steps, layers[0].reason) == ((), f"the forward of Model {reason}")
    # Autograd refuses what was written to; checkpoints of torch's layers count a batch twice, those of ours once.
    ours = assert_same(body, gradients=name not in ("elements written", "checkpoint"))
    assert type(ours) is Model
    assert (ours.kept, ours.notes) == ((3, []) if name == "counts" else (0, [1, 1, 1] if name == "notes" else []))


def test_modes_are_as_they_were_after_a_trace() -> None:
    model = Model(half_frozen)
    model.relu.eval()
    convert(model, inplace=True)
    assert [name for name, module in model.named_modules() if not module.training] == ["relu"]
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_one_function_for_blocks_of_the_same_code() -> None:
    """So that torch.compile compiles it once."""
    first, second = (convert(Model(TOGETHER["in place"][0])) for _ in range(2))
    plans = [model.__dict__["_evennorm_plan"] for model in (first, second)]
    assert plans[0].forwards[True] is plans[1].forwards[False]


def test_the_step_by_itself() -> None:
    norm = convert(nn.BatchNorm2d(3))
    for activation, expected in (
        (None, lambda y: y),
        (nn.ReLU(), F.relu),
        (RELU, F.relu),
        (RELU6, F.relu6),
        (Activation(0.2), lambda y: F.leaky_relu(y, 0.2)),
        (nn.Tanh(), torch.tanh),
    ):
        torch.testing.assert_close(normalized(norm, X, X, activation), expected(norm(X) + X))
        torch.testing.assert_close(normalized(None, X, None, activation), expected(X))
