"""Test what only a GPU can show: graphs, the order of programs, that nothing waits for it, arrays of several GB."""

from __future__ import annotations

import pytest

from tests.contract.on_triton import DEVICE, ON_GPU, on_gpu_kernels  # isort: skip, may skip all

import torch

from evennorm.kernels.triton import launch
from evennorm.torch import BatchNorm1d, BatchNorm2d, batch_norm

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: make test-gpu")

__all__ = ["on_gpu_kernels"]


SHAPES = {
    "streamed": (4096, 256),
    "on the chip": (512, 256),
    "many channels on the chip": (6, 5000),
    "planes": (8, 64, 56, 56),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def module_of(shape: tuple[int, ...], momentum: float | None = 0.1) -> torch.nn.Module:
    kind = BatchNorm1d if len(shape) == 2 else BatchNorm2d
    return kind(shape[1], momentum=momentum, activation="relu", device=DEVICE)


@every_shape
def test_a_graph_records_and_replays(shape) -> None:
    """Running statistics and counters included, beside the same layer on another stream."""
    x, dy = torch.randn(2, *shape, device=DEVICE)
    x.requires_grad_()
    module, expected = module_of(shape), module_of(shape)

    def step(module: torch.nn.Module) -> list[torch.Tensor]:
        y = module(x)
        return [y, *torch.autograd.grad(y, [x, *module.parameters()], dy)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(module)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step(module)
    step(expected)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    other = module_of(shape)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(20):
            other(x.detach())
    for _ in range(20):
        graph.replay()
        wanted = step(expected)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(recorded, wanted, strict=True))
    for name, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert other.num_batches_tracked.item() == 20
    assert other.skipped_batches.item() == 0


@every_shape
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_program_that_comes_last_sees_what_all_others_stored(shape, momentum) -> None:
    """However programs follow one another: the same statistics again and again, and in every channel."""
    module, same = module_of(shape, momentum), torch.randn(shape, device=DEVICE)
    for _ in range(500):
        module(same)
    axes = [a for a in range(same.ndim) if a != 1]
    weight = 1.0 if momentum is None else 1 - 0.9**500
    torch.testing.assert_close(module.running_mean.double(), weight * same.double().mean(axes), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.running_var.double(), same.double().var(axes), rtol=1e-5, atol=1e-6)
    broken = same.clone()
    broken[-1, -1] = float("nan")
    before = module.running_var.clone()
    for step in range(100):
        module(broken if step % 2 else same)
    assert module.skipped_batches.item() == 50
    torch.testing.assert_close(module.running_var, before, rtol=1e-5, atol=0)


@every_shape
def test_direct_launches_compute_what_those_of_triton_do(shape, monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = torch.randn(2, *shape, device=DEVICE)
    x.requires_grad_()

    def results() -> list[torch.Tensor]:
        module = module_of(shape)
        found = []
        for _ in range(3):
            y = module(x)
            found += [y, *torch.autograd.grad(y, [x, *module.parameters()], dy), *module.state_dict().values()]
        return [value.clone() for value in found]

    direct = results()
    monkeypatch.setattr(launch, "_observed", lambda: True)
    assert all(torch.equal(a, b) for a, b in zip(direct, results(), strict=True))


@every_shape
def test_nothing_waits_for_the_device(shape) -> None:
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    module, dy = module_of(shape), torch.ones_like(x)

    def step() -> None:
        torch.autograd.grad(module.train()(x), x, dy)
        with torch.no_grad():
            module.eval()(x)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_gpu_than_the_current_one() -> None:
    module = BatchNorm1d(256, device="cuda:1")
    x = torch.randn(4096, 256, device="cuda:1", requires_grad=True)
    y = module(x)
    y.sum().backward()
    torch.testing.assert_close(y.mean(0), torch.zeros(256, device="cuda:1"), rtol=0, atol=1e-5)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("shape", [(33_600_001, 64), (1, 2, 1_080_000_001)])
def test_more_than_2_to_the_31_elements(shape) -> None:
    x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    y, moments = batch_norm(x, axis=1)
    part = x.flatten()[-3 * (1 << 20) :].double()
    lanes = (torch.arange(part.numel(), device=DEVICE) + (x.numel() - part.numel())) // (shape[2] if len(shape) > 2 else 1)
    channel = lanes % shape[1]
    exact = (part - moments.mean[channel]) / (moments.variance[channel] + 1e-5).sqrt()
    torch.testing.assert_close(y.flatten()[-part.numel() :].double(), exact, rtol=2**-8, atol=1e-5)
    assert abs(float(moments.variance.mean()) - 1) < 1e-3
