"""What only a GPU can show: graphs, that nothing waits for it, arrays of several GB."""

from __future__ import annotations

import pytest

from tests.contract.on_triton import DEVICE, ON_GPU, served  # isort: skip, may skip all

import torch

from evennorm.core.moments import Moments
from evennorm.torch import batch_norm, engine, normalize

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: make test-gpu")

__all__ = ["served"]


def test_a_graph_records_and_replays() -> None:
    x, dy = torch.randn(2, 4096, 256, device=DEVICE)
    x.requires_grad_()

    def step() -> list[torch.Tensor]:
        y, moments = batch_norm(x, axis=1, activation="relu")
        return [y, *moments[1:], *torch.autograd.grad(y, x, dy)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(recorded, step(), strict=True))


def test_nothing_waits_for_the_device() -> None:
    x = torch.randn(4096, 256, device=DEVICE, requires_grad=True)
    kept = tuple(torch.zeros(256, device=DEVICE) for _ in range(3))
    dy = torch.ones_like(x)

    def step() -> None:
        y, moments = batch_norm(x, axis=1, activation="relu")
        engine.follow(kept, Moments(moments.count, *(s.detach().reshape(1, -1) for s in moments[1:])), 0.9)
        torch.autograd.grad(y, x, dy)
        with torch.no_grad():
            normalize(x, kept[0], kept[2], axis=1)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
