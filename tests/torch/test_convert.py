"""A converted model computes, learns, saves and loads as the original does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from evennorm.torch import convert, report, revert
from evennorm.torch.modules import _BatchNorm
from tests.torch.architectures import ARCHITECTURES

NAMES = sorted(ARCHITECTURES)


def model_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """With parameters and statistics of all sizes and signs."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].make().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def batches(count: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 16, 16, generator=generator, dtype=dtype) for _ in range(count)]


def trained(model: nn.Module) -> list[Tensor]:
    """Losses and gradients of three steps, an evaluation after each."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    seen = []
    for x in batches(dtype=next(model.parameters()).dtype):
        model.train()
        y = model(x)
        loss = F.mse_loss(y, torch.ones_like(y))
        optimizer.zero_grad()
        loss.backward()
        seen += [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        model.eval()
        with torch.no_grad():
            seen.append(model(x))
    return seen


def assert_same(model: nn.Module, other: nn.Module, rtol: float = 1e-9) -> None:
    for ours, theirs in zip(trained(other), trained(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    for (key, ours), theirs in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, msg=key)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_training_and_evaluation_are_the_same(name: str, fuse: bool) -> None:
    model = model_of(name)
    ours = convert(model, fuse=fuse)
    assert all(isinstance(m, _BatchNorm) for m in ours.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    assert_same(model, ours)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_and_channels_last(name: str) -> None:
    model = model_of(name, torch.float32)
    if name != "video":
        model = model.to(memory_format=torch.channels_last)
    ours = convert(model)
    for x in batches(2, torch.float32):
        expected = model.double()(x.double())
        torch.testing.assert_close(ours(x).double(), expected, rtol=1e-3, atol=1e-3)
        model.float()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_fused(name: str) -> None:
    layers = report(convert(model_of(name))).layers
    assert all(layer.exchanged for layer in layers)
    assert {layer.name: " + ".join(layer.steps) for layer in layers if layer.steps} == ARCHITECTURES[name].together
    assert all(layer.steps or layer.reason for layer in layers)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_load_both_ways(name: str) -> None:
    model = model_of(name)
    ours = convert(model)
    assert list(ours.state_dict()) == list(model.state_dict())
    assert [key for key, _ in ours.named_modules()] == [key for key, _ in model.named_modules()]
    fresh = ARCHITECTURES[name].make().double()
    fresh.load_state_dict(ours.state_dict(), strict=True)
    again = convert(ARCHITECTURES[name].make().double())
    again.load_state_dict(model.state_dict(), strict=True)
    assert_same(fresh, again)


@pytest.mark.parametrize("name", NAMES)
def test_the_way_back(name: str) -> None:
    model = model_of(name)
    back = revert(convert(model))
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    for ours, theirs in zip(back.modules(), model.modules(), strict=True):
        assert vars(ours).keys() == vars(theirs).keys()
        assert ours._buffers.keys() == theirs._buffers.keys()
    assert_same(model, back, rtol=0)
