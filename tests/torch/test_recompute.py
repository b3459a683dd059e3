"""Outputs that are computed again in the backward pass: the same gradients, less memory, and nothing silently wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from evennorm.torch import BatchNorm2d, batch_norm, convert, recompute_outputs
from tests.torch.architectures import ARCHITECTURES


class Block(nn.Module):
    """Two normalizations, the second with a residual; what it gives is noted without being held."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), BatchNorm2d(channels, activation="relu")
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), BatchNorm2d(channels, activation="relu")
        self.inside: StorageWeakRef | None = None
        self.output: StorageWeakRef | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x))
        self.inside = StorageWeakRef(y.untyped_storage())
        y = self.bn2(self.conv2(y), x)
        self.output = StorageWeakRef(y.untyped_storage())
        return y


def gradients(model: nn.Module, x: torch.Tensor, recompute: bool) -> list[torch.Tensor]:
    model.zero_grad()
    if recompute:
        with recompute_outputs():
            loss = model(x).square().mean()
    else:
        loss = model(x).square().mean()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_the_same_and_outputs_are_gone(memory, dtype) -> None:
    torch.manual_seed(1)
    blocks = [Block(6) for _ in range(5)]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(6 * 25, 3)).to(dtype)
    if dtype is torch.bfloat16:
        for block in blocks:
            block.bn1.float(), block.bn2.float()
    x = torch.randn(4, 6, 5, 5).to(dtype).contiguous(memory_format=memory)

    with recompute_outputs():
        y = model(x)
    assert all(block.inside.expired() for block in blocks)
    # The third is kept, for those behind it to be computed from; the linear layer's view of the last is computed too.
    assert [block.output.expired() for block in blocks] == [True, True, False, True, True]
    y.square().mean().backward()
    torch.testing.assert_close(gradients(model, x, True), gradients(model, x, False), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ResNet-50", "ResNet of Sequentials", "MobileNetV2", "DenseNet", "Inception", "U-Net"])
def test_whole_networks(name) -> None:
    torch.manual_seed(2)
    model = convert(ARCHITECTURES[name].make())
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(gradients(model, x, True), gradients(model, x, False), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{"virtual_batch_size": 2}, {"activation": "leaky_relu"}, {"activation": "relu6"}, {"affine": False}]
)
def test_options(options) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4, **options), nn.Conv2d(4, 4, 3))
    x = torch.randn(6, 3, 8, 8)
    torch.testing.assert_close(gradients(model, x, True), gradients(model, x, False), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [lambda y: y.add_(1.0), torch.relu_, lambda y: y.clamp_(-1, 1), lambda y: y[:, :1].zero_() + y],
)
def test_outputs_that_were_written_to_are_kept(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(4)
    norm, conv = BatchNorm2d(4), nn.Conv2d(2, 3, 3)
    x = torch.randn(5, 4, 6, 6)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = norm, conv

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(change(self.norm(x))[:, :2])  # of which the convolution keeps a view

    torch.testing.assert_close(gradients(Model(), x, True), gradients(Model(), x, False), rtol=0, atol=0)


def test_memory_that_another_tensor_has_taken_over_is_not_mistaken() -> None:
    x = torch.randn(4, 3, 64, 64)
    weight = torch.ones(3, requires_grad=True)
    with recompute_outputs():
        losses = torch.zeros(())
        for _ in range(20):
            batch_norm(x, weight, axis=1)  # read by nobody: its memory is the next tensor's
            z = torch.randn(4, 3, 64, 64, requires_grad=True)
            product = z * weight.reshape(3, 1, 1)  # keeps z
            losses = losses + product.sum()
            (dw,) = torch.autograd.grad(product.sum(), weight)
            torch.testing.assert_close(dw, z.sum((0, 2, 3)))


def test_inputs_that_were_written_to_are_named() -> None:
    x, weight = torch.randn(4, 3), torch.ones(3, requires_grad=True)
    with recompute_outputs():
        y, _ = batch_norm(x, weight)
        z = y * torch.ones(3, requires_grad=True)
    x += 1
    with pytest.raises(RuntimeError, match="cannot be computed again: its input, residual or parameters have been modified"):
        z.sum().backward()


def test_second_derivatives() -> None:
    torch.manual_seed(5)
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 4), (2,), (2,), (3, 2, 4))]

    def compute(x, gamma, beta, residual):
        with recompute_outputs():
            y, _ = batch_norm(x, gamma, beta, axis=1, residual=residual, activation="leaky_relu")
            return y * y.cos()

    assert torch.autograd.gradcheck(compute, leaves)
    assert torch.autograd.gradgradcheck(compute, leaves)


def test_checkpoints_inside_decide_for_themselves() -> None:
    torch.manual_seed(6)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(3), Block(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(checkpoint(self.first, x, use_reentrant=False))

    model, x = Checkpointed(), torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(gradients(model, x, True), gradients(model, x, False), rtol=0, atol=0)
    assert int(model.first.bn1.num_batches_tracked) == 2


def test_compiled_programs_inside_give_the_same() -> None:
    torch.manual_seed(7)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 4, 3)),
        torch.randn(4, 3, 8, 8),
    )
    expected = gradients(model, x, False)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, x, True), expected, rtol=1e-5, atol=1e-6)


def test_without_gradients_and_outside_nothing_is_held() -> None:
    x = torch.randn(4, 3, 6, 6)
    held = StorageWeakRef(x.untyped_storage())
    norm = BatchNorm2d(3)
    with torch.no_grad(), recompute_outputs():
        norm(x)
        del x
        assert held.expired()
    y = norm(torch.randn(4, 3, 6, 6))
    loss = (y * y).sum()
    kept = StorageWeakRef(y.untyped_storage())
    del y
    assert not kept.expired(), "the product keeps its factors"
    loss.backward()
