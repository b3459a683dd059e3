"""Tensors whose memory is not simply their values: negated when read, unaligned, of no elements, spread over devices."""

from __future__ import annotations

import copy
import os
import signal
from typing import Any

import pytest
import torch
from torch import nn

from evennorm import torch as ours


def negated(values: torch.Tensor) -> torch.Tensor:
    """A tensor of these values, of which memory holds the opposite."""
    tensor = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert tensor.is_neg()
    return tensor


def step(module: nn.Module, x: torch.Tensor, dy: torch.Tensor, relu: bool = False) -> list[torch.Tensor]:
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    y = torch.relu(y) if relu else y
    gradients = torch.autograd.grad(y, (leaf, module.weight, module.bias), dy)
    return [y, *gradients, module.running_mean, module.running_var]


@pytest.mark.parametrize("which", ["x", "dy", "weight", "bias", "running_mean", "running_var", "all"])
@pytest.mark.parametrize("training", [True, False])
def test_negated_tensors(which, training) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(6, 4, 5), torch.randn(6, 4, 5)
    theirs, mine = nn.BatchNorm1d(4).train(training), ours.BatchNorm1d(4, activation="relu").train(training)
    nn.init.uniform_(theirs.weight), nn.init.normal_(theirs.bias)
    theirs.running_mean.normal_(), theirs.running_var.uniform_(0.5, 2)
    mine.load_state_dict(theirs.state_dict())
    for name in ("weight", "bias", "running_mean", "running_var"):
        if which in (name, "all"):
            tensor = negated(getattr(mine, name).detach())
            setattr(mine, name, nn.Parameter(tensor) if name in ("weight", "bias") else tensor)
            assert getattr(mine, name).is_neg()
    given = [negated(t) if which in (name, "all") else t for name, t in (("x", x), ("dy", dy))]
    torch.testing.assert_close(step(mine, *given), step(theirs, x, dy, relu=True), rtol=1e-5, atol=1e-5)


def test_a_negated_residual() -> None:
    x, residual = torch.randn(6, 4, 5), torch.randn(6, 4, 5)
    module = ours.BatchNorm1d(4, activation="relu")
    torch.testing.assert_close(module(x, negated(residual)), copy.deepcopy(module)(x, residual), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_views_that_begin_anywhere_in_memory(offset, dtype) -> None:
    shape, size = (6, 5, 7), 6 * 5 * 7
    x, dy = (torch.randn(size + offset).to(dtype)[offset:].view(shape) for _ in range(2))
    parameters = None if dtype is torch.bfloat16 else dtype
    theirs, mine = nn.BatchNorm1d(5, dtype=parameters), ours.BatchNorm1d(5, activation="relu", dtype=parameters)
    rows = [torch.rand(5 + offset).to(mine.weight.dtype)[offset:] for _ in range(2)]
    for module in (theirs, mine):
        module.weight, module.bias = map(nn.Parameter, rows)
    bound = 2**-6 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(step(mine, x, dy), step(theirs, x, dy, relu=True), rtol=bound, atol=bound)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (5, 4, 0)])
def test_no_elements(shape) -> None:
    module = ours.BatchNorm1d(4)
    y = module(torch.zeros(shape, requires_grad=True))
    y.sum().backward()
    assert y.shape == shape
    assert (int(module.num_batches_tracked), int(module.skipped_batches)) == (1, 1)
    assert not module.weight.grad.any()
    assert torch.equal(module.running_var, torch.ones(4))


def test_the_vectorized_backward_pass() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    y, dys = ours.BatchNorm1d(4, activation="relu")(x), torch.randn(3, 6, 4)
    (together,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    one_by_one = torch.stack([torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys])
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)


def spread(rank: int, file: str, results: Any) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, dy = torch.randn(4, 6, 5) * 3 + 2, torch.randn(4, 6, 5)
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        theirs, mine = nn.BatchNorm1d(6), distribute_module(ours.BatchNorm1d(6, activation="relu"), mesh)
        inputs = distribute_tensor(x, mesh, [placement]).requires_grad_()
        y = mine(inputs)
        y.backward(distribute_tensor(dy, mesh, [placement]))
        found = [y, inputs.grad, mine.weight.grad, mine.bias.grad, mine.running_mean, mine.running_var]
        evaluated = mine.eval()(inputs)
        found = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in (*found, evaluated)]
        leaf = x.clone().requires_grad_()
        expected = torch.relu(theirs(leaf))
        expected.backward(dy)
        wanted = [expected, leaf.grad, theirs.weight.grad, theirs.bias.grad, theirs.running_mean, theirs.running_var]
        torch.testing.assert_close(found, [*wanted, torch.relu(theirs.eval()(x))], rtol=1e-5, atol=1e-5)
        assert y.placements == (placement,)
        values, _ = ours.batch_norm(inputs, axis=1)
        torch.testing.assert_close(values.full_tensor(), ours.batch_norm(x, axis=1)[0])
    distributed.destroy_process_group()


def test_tensors_spread_over_devices(tmp_path) -> None:
    """Statistics are those of the whole batch, as of torch's module, however it is spread."""
    for attempt in range(3):
        try:
            store = str(tmp_path / f"store {attempt}")
            torch.multiprocessing.start_processes(spread, (store, None), nprocs=2, start_method="spawn")
        except torch.multiprocessing.ProcessExitedException as error:
            # Gloo's threads outlive the interpreter now and then: pytorch/pytorch#179291.
            if error.exit_code != -signal.SIGABRT or attempt == 2:
                raise
        else:
            return
