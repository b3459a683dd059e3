"""Whole models in training beside torch's modules: the same losses, under autocast, in other layouts, over processes."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import evennorm.torch as ours
from tests.torch.test_modules_programs import run_onnx


class Theirs(nn.Module):
    """torch's modules, behind the interface of ours."""

    def __init__(self, channels: int, activation: str | None = None):
        super().__init__()
        self.norm, self.activation = nn.BatchNorm2d(channels), activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x) if residual is None else self.norm(x) + residual
        return y.relu() if self.activation else y


class Ours(nn.Module):
    """The same names around ours, so that checkpoints fit."""

    def __init__(self, channels: int, activation: str | None = None):
        super().__init__()
        self.norm = ours.BatchNorm2d(channels, activation=activation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.norm(x, residual)


class Block(nn.Module):
    """A residual block, with its projection where the number of channels changes."""

    def __init__(self, norm: Callable[..., nn.Module], inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outside, "relu")
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = norm(outside, "relu")
        self.short = None
        if stride > 1 or inside != outside:
            self.short = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), norm(outside))

    def forward(self, x: Tensor) -> Tensor:
        short = x if self.short is None else self.short(x)
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), short)


def resnet(norm: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        norm(8, "relu"),
        Block(norm, 8, 8, 1),
        Block(norm, 8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    labels = [torch.randint(0, 4, (32,), generator=generator) for _ in range(steps)]
    images = [torch.randn(32, 3, 8, 8, generator=generator) for _ in range(steps)]
    return [(x + y.view(-1, 1, 1, 1) - 1.5, y) for x, y in zip(images, labels, strict=True)]


def losses(
    model: nn.Module,
    steps: int = 20,
    layout: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for x, y in batches(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(x.to(dtype=dtype, memory_format=layout)), y)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=["float64", "float32"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_residual_network_takes_the_same_steps(layout: torch.memory_format, dtype: torch.dtype, rounding: float) -> None:
    """In float32 rounding moves a value over relu's kink now and then, and the gradient jumps."""
    models = [resnet(norm).to(dtype=dtype, memory_format=layout) for norm in (Theirs, Ours)]
    theirs, own = (losses(model, layout=layout, dtype=dtype) for model in models)
    assert theirs[-1] < 0.8 * theirs[0]
    np.testing.assert_allclose(own, theirs, rtol=rounding)
    a, b = (model.state_dict() for model in models)
    assert list(a) == list(b)
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=rounding, atol=rounding, msg=lambda m, key=key: f"{key}: {m}")


def test_under_autocast() -> None:
    """bfloat16 between the layers, float32 in parameters and statistics."""
    models = resnet(Theirs), resnet(Ours)
    theirs, own = (losses(model, autocast=True) for model in models)
    np.testing.assert_allclose(own[:5], theirs[:5], rtol=2e-2)
    assert own[-1] < 0.8 * own[0]
    assert {value.dtype for value in models[1].state_dict().values()} == {torch.float32, torch.int64}
    with torch.autocast("cpu", torch.bfloat16):
        assert models[1][:3](torch.randn(2, 3, 8, 8)).dtype is torch.bfloat16


def test_a_trained_network_goes_on_elsewhere(tmp_path: Path) -> None:
    """Saved, loaded into torch's modules and back, and run by onnxruntime."""
    model = resnet(Ours)
    losses(model, steps=5)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    theirs, again = resnet(Theirs), resnet(Ours)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    again.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 8, 8)
    expected = theirs.eval()(x).detach()
    torch.testing.assert_close(again.eval()(x).detach(), expected, rtol=1e-5, atol=1e-5)
    operators, y = run_onnx(again, x, file=tmp_path / "network.onnx", optimize=False)
    assert operators.count("BatchNormalization") == 6
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_same_bits_in_every_run() -> None:
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            model = resnet(Ours)
            runs.append((losses(model, steps=3), [value.clone() for value in model.state_dict().values()]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def _two_processes(rank: int, address: str, results: multiprocessing.SimpleQueue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(ours.BatchNorm1d(3, activation="relu"), nn.Linear(3, 1)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(10 * rank + step))
        if step == 1 and rank == 0:
            x[0, 0] = torch.nan  # only the first process, whose buffers the others are given, counts it
        optimizer.zero_grad()
        model(x).square().mean().nan_to_num().backward()
        optimizer.step()
    model.eval()(torch.zeros(1, 3))
    buffers = {key: value.tolist() for key, value in model.module.named_buffers()}
    results.put((rank, buffers))
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Buffers of the first process are broadcast before each step; the statistics stay those of its own batches."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    address = f"file://{tmp_path / 'rendezvous'}"
    processes = [context.Process(target=_two_processes, args=(rank, address, results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    buffers = dict(results.get() for _ in range(2))
    expected = nn.BatchNorm1d(3)
    for step in (0, 2):
        expected(torch.randn(8, 3, generator=torch.Generator().manual_seed(step)))
    np.testing.assert_allclose(buffers[0]["0.running_mean"], expected.running_mean.numpy(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(buffers[0]["0.running_var"], expected.running_var.numpy(), rtol=1e-5)
    assert buffers[0]["0.skipped_batches"] == 1
    assert buffers[0]["0.num_batches_tracked"] == buffers[1]["0.num_batches_tracked"] == 3
