"""What the processes of tests run. Each function is called at once in all; tensors go and come as NumPy arrays."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from evennorm import torch as ours
from evennorm.torch import collectives

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def part_of(values: Any, sizes: list[int]) -> Any:
    """This process's part of the first axis."""
    rank = dist.get_rank()
    return values[sum(sizes[:rank]) : sum(sizes[: rank + 1])]


def summed(*tensors: Tensor) -> list[np.ndarray]:
    """Over all processes, in float64."""
    found = []
    for tensor in tensors:
        total = tensor.double()
        dist.all_reduce(total)
        found.append(total.numpy())
    return found


def array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).double().numpy()


def step(
    x: np.ndarray,
    dy: np.ndarray,
    sizes: list[int],
    dtype: str = "float32",
    residual: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    channels_last: bool = False,
    **options: Any,
) -> dict[str, np.ndarray]:
    """One training step of a module on this process's part."""
    torch.manual_seed(1)
    module = ours.SyncBatchNorm(x.shape[1], **options)
    if module.weight is not None:
        nn.init.uniform_(module.weight, 0.5, 1.5)
        nn.init.normal_(module.bias)
    if dtype == "float64":
        module.double()

    def part(values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(part_of(values, sizes)).to(DTYPES[dtype])
        if channels_last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    leaves = [part(x).requires_grad_()]
    leaves += [] if residual is None else [part(residual).requires_grad_()]
    own_mask = None if mask is None else torch.from_numpy(part_of(mask, sizes))
    y = module(*leaves, mask=own_mask)
    y.backward(part(dy))
    found = {"y": array(y), "dx": array(leaves[0].grad)}
    if residual is not None:
        found["d_residual"] = array(leaves[1].grad)
    if module.weight is not None:
        found["d_gamma"], found["d_beta"] = summed(module.weight.grad, module.bias.grad)
    for name, buffer in module.named_buffers():
        found[name] = array(buffer)
    return found


def step_masked_on_first(x: np.ndarray, dy: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Only the first process gives its part of the mask; the others count all of their values."""
    half = len(x) // 2
    return step(x, dy, [half, half], "float32", None, mask if dist.get_rank() == 0 else None)


def step_with(options: dict[str, Any], *given: Any) -> dict[str, np.ndarray]:
    return step(*given, **options)


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """Names and sizes, in numbers per process."""
    found: list[tuple[str, int]] = []
    kept = {(dist, name): getattr(dist, name) for name in ("all_reduce", "batch_isend_irecv", "all_gather", "broadcast")}
    kept[collectives, "_all_gather"] = collectives._all_gather

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **options: Any) -> Any:
            found.append((name.strip("_"), given[-1].numel() if isinstance(given[-1], Tensor) else len(given[-1])))
            return function(*given, **options)

        return run

    for (module, name), function in kept.items():
        setattr(module, name, counting(name, function))
    try:
        yield found
    finally:
        for (module, name), function in kept.items():
            setattr(module, name, function)


def collectives_of_a_step(channels: int) -> list[list[tuple[str, int]]]:
    """Of forward and backward, in the first step and in the second."""
    module = ours.SyncBatchNorm(channels, activation="relu")
    found = []
    for _ in range(2):
        x = torch.randn(4, channels, 3, 3, requires_grad=True)
        with counted_collectives() as forward:
            y = module(x, torch.randn_like(x))
        with counted_collectives() as backward:
            y.sum().backward()
        found.append([*forward, *backward])
    return found


def bits(steps: int) -> list[bytes]:
    torch.manual_seed(7 + dist.get_rank())
    module = ours.SyncBatchNorm(9, activation="relu")
    x = torch.randn(5, 9, 6, 6, requires_grad=True)
    found = []
    for _ in range(steps):
        module.reset_running_stats()
        y = module(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        found.append(b"".join(t.detach().numpy().tobytes() for t in (y, dx, module.running_mean, module.running_var)))
    return found


# Networks


def network(synchronized: bool = True) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        ours.BatchNorm2d(6, activation="relu"),
        nn.Conv2d(6, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    model(torch.zeros(2, 2, 8, 8))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    model.double()
    return ours.SyncBatchNorm.convert_sync_batchnorm(model) if synchronized else model


def batches(steps: int, samples: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(samples, 2, 8, 8, generator=generator).double() * 3 + 100,
            torch.randn(samples, 3, generator=generator).double(),
        )
        for _ in range(steps)
    ]


def state_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: array(value) for name, value in model.state_dict().items()}


def train(model: nn.Module, sizes: list[int] | None, steps: int = 3, accumulate: bool = False) -> dict[str, np.ndarray]:
    """SGD on the whole batch, or on this process's part with the loss of the whole."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number, (x, target) in enumerate(batches(steps, 8)):
        own = (x, target) if sizes is None else (part_of(x, sizes), part_of(target, sizes))
        scale = 1 if sizes is None else dist.get_world_size()  # DDP takes the mean over processes

        def run(own: Any = own, scale: int = scale) -> None:
            (scale * (model(own[0]) - own[1]).square().sum() / 24).backward()

        if accumulate and number % 2 == 0:
            with model.no_sync() if sizes is not None else torch.enable_grad():
                run()
            continue
        run()
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model.module if isinstance(model, DistributedDataParallel) else model)


def data_parallel(
    sizes: list[int], accumulate: bool = False, options: dict[str, Any] | None = None
) -> dict[str, np.ndarray]:
    return train(DistributedDataParallel(network(), **(options or {})), sizes, accumulate=accumulate)


def fully_sharded(sizes: list[int]) -> dict[str, np.ndarray]:
    from torch.distributed.fsdp import fully_shard

    model = network()
    for layer in model:
        if isinstance(layer, ours.SyncBatchNorm | nn.Conv2d):
            fully_shard(layer)
    fully_shard(model)
    return train(model, sizes)


def by_hand(model: nn.Module, sizes: list[int]) -> None:
    """Train without DistributedDataParallel: gradients are summed here."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, target in batches(3, 8):
        (model(part_of(x, sizes)) - part_of(target, sizes)).square().sum().div(24).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        optimizer.step()
        optimizer.zero_grad()


def compiled(sizes: list[int], backend: str) -> dict[str, np.ndarray]:
    """By a program without a graph break."""
    model = network()
    by_hand(torch.compile(model, fullgraph=True, backend=backend), sizes)
    return state_of(model)


def checkpointed(sizes: list[int], reentrant: bool) -> dict[str, np.ndarray]:
    inner = network()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x.requires_grad_(), use_reentrant=reentrant)

    by_hand(Checkpointed(), sizes)
    return state_of(inner)


def without_gradients_on(quiet: list[int], samples: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Output and input gradient; some processes compute under no_grad."""
    torch.manual_seed(11)
    x = torch.randn(samples, 3, 4)
    own = x.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    module = ours.SyncBatchNorm(3)
    if dist.get_rank() in quiet:
        with torch.no_grad():
            return array(module(own)), None
    y = module(own)
    y.pow(3).sum().backward()
    return array(y), array(own.grad)


def ghost(group_size: int) -> dict[str, np.ndarray]:
    group, _ = dist.new_subgroups(group_size)
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5).chunk(dist.get_world_size())[dist.get_rank()]
    module = ours.SyncBatchNorm(3, process_group=group)
    return {"y": array(module(x)), "mean": array(module.running_mean)}


def spread_over_a_mesh() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A batch that lies over the first axis of a 2-D mesh, and a copy on the second."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "model"))
    torch.manual_seed(2)
    x = torch.randn(8, 3, 4, 4)
    spread = distribute_tensor(x, mesh, [Shard(0), Replicate()]).requires_grad_()
    module = ours.SyncBatchNorm(3, activation="relu")
    y = module(spread)
    y.square().sum().backward()
    return array(y.full_tensor()), array(spread.grad.full_tensor()), array(module.running_var)


# Faults


def different_inputs(channels: list[int], dtypes: list[str]) -> np.ndarray:
    rank = dist.get_rank()
    module = ours.SyncBatchNorm(channels[rank]).to(DTYPES[dtypes[rank]])
    return array(module(torch.randn(4, channels[rank], 3, dtype=DTYPES[dtypes[rank]])))


def outside_of_its_group() -> np.ndarray:
    group = dist.new_group([0])
    return array(ours.SyncBatchNorm(3, process_group=group)(torch.randn(4, 3)))


def evaluation_on_one(steps: int) -> bool:
    """The last process evaluates after some steps."""
    model = nn.Sequential(nn.Linear(3, 4), ours.SyncBatchNorm(4))
    for _ in range(steps):
        model(torch.randn(5, 3))
    model.train(dist.get_rank() != dist.get_world_size() - 1)
    model(torch.randn(5, 3))
    return True


def killed(during: str) -> bool:
    """The last process is killed before its collective of the second step."""
    model = nn.Sequential(nn.Linear(3, 4), ours.SyncBatchNorm(4))
    last = dist.get_rank() == dist.get_world_size() - 1
    for number in range(2):
        if number and last and during == "forward":
            os.kill(os.getpid(), signal.SIGKILL)
        y = model(torch.randn(5, 3, requires_grad=True))
        if number and last and during == "backward":
            os.kill(os.getpid(), signal.SIGKILL)
        y.sum().backward()
    return True
