"""Every batch is counted once, whoever runs the forward pass, and however often."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import evennorm.torch as ours
from evennorm.torch import counted

BOTH = pytest.mark.parametrize("use_reentrant", [True, False])


def batch(seed: int = 0, wants_gradient: bool = True) -> Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(wants_gradient)


def check(module: nn.Module, *batches: Tensor) -> None:
    """The statistics are those of torch's module after these batches, each of them once."""
    theirs = nn.BatchNorm1d(4)
    with torch.no_grad():
        for x in batches:
            theirs(x)
    assert int(module.num_batches_tracked) == len(batches)
    torch.testing.assert_close(module.running_mean, theirs.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.running_var, theirs.running_var, rtol=1e-5, atol=1e-6)


class Reversible(torch.autograd.Function):
    """Keeps its input, and takes the forward pass once more for the gradient."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.module(x)
        return torch.autograd.grad(y, x, dy)[0], None


class WithContext(torch.autograd.Function):
    """Likewise, in the other form that torch knows: the forward pass does not see the node."""

    @staticmethod
    def forward(x, module):
        return module(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.module = inputs
        ctx.save_for_backward(x)

    backward = Reversible.backward


class OnlyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, module, other):
        ctx.module, ctx.other = module, other
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        ctx.module(ctx.other)
        return dy, None, None


@BOTH
def test_checkpointed(use_reentrant: bool) -> None:
    module, x = ours.BatchNorm1d(4), batch()
    checkpoint(module, x, use_reentrant=use_reentrant).sum().backward()
    check(module, x)


@BOTH
def test_several_at_once(use_reentrant: bool) -> None:
    """Two passes before one backward pass, and one that has none."""
    module, a, b, c = ours.BatchNorm1d(4), batch(0), batch(1), batch(2)
    ya, yb, _ = (checkpoint(module, x, use_reentrant=use_reentrant) for x in (a, b, c))
    (ya.square().sum() + yb.square().sum()).backward()
    check(module, a, b, c)


@BOTH
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_nested(use_reentrant: bool) -> None:
    module, x, seen = ours.BatchNorm1d(4), batch(), []

    def inner(x):
        seen.append(x.detach())
        return module(x) * 2

    checkpoint(
        lambda x: checkpoint(inner, x * 3, use_reentrant=use_reentrant), x, use_reentrant=use_reentrant
    ).sum().backward()
    assert len(seen) >= 2
    check(module, seen[0])


def test_repeated_twice() -> None:
    module, x = ours.BatchNorm1d(4), batch()
    loss = checkpoint(module, x, use_reentrant=False).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    check(module, x)


@pytest.mark.parametrize("function", [Reversible, WithContext])
def test_repeated_by_a_function_of_the_users(function) -> None:
    module, x = ours.BatchNorm1d(4), batch()
    loss = function.apply(x, module).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    check(module, x)
    plain, y = ours.BatchNorm1d(4), batch()
    torch.testing.assert_close(x.grad, 2 * torch.autograd.grad(plain(y).square().sum(), y)[0], rtol=1e-5, atol=1e-6)


@BOTH
def test_only_in_the_recomputation(use_reentrant: bool) -> None:
    module, x, calls = ours.BatchNorm1d(4), batch(), []

    def block(x):
        calls.append(None)
        if len(calls) > 1:
            module(x.detach())
        return x.sin()

    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert len(calls) == 2
    check(module, x)


@pytest.mark.parametrize("kind", ["tensor", "module", "leaf"])
def test_in_a_gradient_hook(kind: str) -> None:
    module, other, x = ours.BatchNorm1d(4), batch(1, False), batch()

    def hook(*_):
        module(other)

    linear = nn.Linear(4, 4)
    y = linear(x)
    match kind:
        case "tensor":
            y.register_hook(hook)
        case "module":
            linear.register_full_backward_hook(hook)
        case "leaf":
            linear.weight.register_post_accumulate_grad_hook(hook)
    y = linear(x) if kind == "module" else y
    y.sum().backward()
    check(module, other)


def test_in_the_forward_pass_and_in_a_hook() -> None:
    module, x, other = ours.BatchNorm1d(4), batch(), batch(1, False)
    y = module(x)
    y.register_hook(lambda _: (module(other), None)[1])
    y.sum().backward()
    check(module, x, other)


@BOTH
def test_checkpointed_and_in_a_hook(use_reentrant: bool) -> None:
    """The hook's pass is no repetition, though one of this module is to come."""
    module, x, other = ours.BatchNorm1d(4), batch(), batch(1, False)
    y = checkpoint(module, x, use_reentrant=use_reentrant)
    y.register_hook(lambda _: (module(other), None)[1])
    y.sum().backward()
    check(module, x, other)


@BOTH
def test_a_hook_inside_what_is_recomputed(use_reentrant: bool) -> None:
    module, x, other = ours.BatchNorm1d(4), batch(), batch(1, False)

    def block(x):
        y = module(x)
        if y.requires_grad and torch._C._current_graph_task_id() != -1:
            y.register_hook(lambda _: (module(other), None)[1])
        return y.sin()

    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    # Without reentry the hook hangs on a graph that nobody goes through.
    check(module, *((x, other) if use_reentrant else (x,)))


def test_only_in_the_backward_pass_of_a_function() -> None:
    module, x, other = ours.BatchNorm1d(4), batch(), batch(1, False)
    OnlyBackward.apply(x, module, other).sum().backward()
    check(module, other)
    OnlyBackward.apply(module(x), module, other).sum().backward()
    check(module, other, x, other)


def test_nothing_is_kept_of_a_graph_that_is_gone() -> None:
    module = ours.BatchNorm1d(4)
    gc.collect()
    before = len(counted._passes)
    for use_reentrant in (True, False):
        for step in range(3):
            checkpoint(module, batch(step), use_reentrant=use_reentrant).sum().backward()
    with torch.no_grad():
        module(batch())
    module(batch()).sum().backward()
    gc.collect()
    assert len(counted._passes) == before
    assert int(module.num_batches_tracked) == 8
