"""Measure which tilings make the GPU kernels fastest for the arrays of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from evennorm.kernels import triton
from evennorm.torch import gpu
from evennorm.torch.errors import UnsupportedError

if TYPE_CHECKING:
    from evennorm.kernels.triton.choices import Measured


class Tuned(NamedTuple):
    """What `tune` found, for each kernel and class of arrays; prints as a table."""

    measured: tuple[Measured, ...]

    @property
    def gained(self) -> float:
        """Milliseconds that both passes save over the shipped choices, for one array of each class."""
        return sum(found.shipped_milliseconds - found.milliseconds for found in self.measured)

    def __str__(self) -> str:
        rows = [("kernel", "groups x outer x channel x inner", "shipped", "chosen", "how")]
        for kernel, sizes, chosen, milliseconds, _, shipped in self.measured:
            how = f"{' x '.join(map(str, chosen.grid))} programs, {chosen.warps} warps, {chosen.constants}"
            rows.append((kernel, " x ".join(map(str, sizes)), f"{shipped:.3f} ms", f"{milliseconds:.3f} ms", how))
        return "\n".join(f"{row[0]:16} {row[1]:32} {row[2]:>10} {row[3]:>10}  {row[4]}" for row in rows)


def tune(model: nn.Module, *inputs: Any, **named: Any) -> Tuned:
    """Measure which choices make the kernels fastest for a model's arrays, and use them for the rest of the process.

    evennorm ships choices of tile and number of programs, by the shape of an array and the number of a GPU's
    multiprocessors. They are good ones; this finds better ones where there are any. It runs the model forward and backward
    once, in training mode, and each kernel some hundred times, which takes seconds. Parameters, their gradients, buffers,
    modes and random numbers are left as they were. What is found holds for all arrays of a class: the number of lines to a
    factor of 4, that of channels to a factor of 2. Small arrays, which launching takes longer than normalizing, keep the
    shipped choices.

    Results may then differ in the last bit from those by the shipped choices, since sums are added in another order.

    Args:
        model: any module that contains evennorm's layers, on a GPU.
        inputs: arguments of the model, of the sizes that it is to be trained with.
        named: arguments by name.

    Returns:
        What was measured, and what was gained; print it.

    Raises:
        UnsupportedError: there is no GPU, Triton is missing, or `torch.use_deterministic_algorithms` forbids it.

    Example:
        >>> import torch
        >>> from evennorm.torch import BatchNorm2d, tune
        >>> if torch.cuda.is_available():
        ...     model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), BatchNorm2d(64)).cuda()
        ...     print(tune(model, torch.randn(32, 3, 224, 224, device="cuda")))
    """
    tensors = [leaf for leaf in tree_leaves((inputs, named)) if isinstance(leaf, Tensor)]
    _check([*model.parameters(), *model.buffers(), *tensors])
    from evennorm.kernels.triton import choices

    with _left_as_it_was(model), choices.measuring(_clock()) as report, torch.enable_grad():
        model.train()
        outputs = [leaf for leaf in tree_leaves(model(*inputs, **named)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        wanted = [tensor for tensor in (*model.parameters(), *tensors) if tensor.requires_grad]
        if outputs and wanted:
            torch.autograd.grad([output.sum() for output in outputs], wanted, allow_unused=True)
        return Tuned(tuple(report))


def _check(tensors: list[Tensor]) -> None:
    if not any(tensor.device.type == gpu.DEVICE for tensor in tensors):
        found = sorted({str(tensor.device) for tensor in tensors}) or ["nothing"]
        raise UnsupportedError(
            f"tune measures on a GPU; received a model and inputs on {', '.join(found)}; move them to one"
        )
    missing = triton.missing()
    if missing is not None:
        raise UnsupportedError(f"tune measures kernels that Triton compiles: {missing}")
    if torch.are_deterministic_algorithms_enabled():
        raise UnsupportedError(
            "torch.use_deterministic_algorithms(True) forbids choices by time, which act on the last bit; tune without it"
        )


def _clock() -> Callable[[Callable[[], Any]], float]:
    from triton.testing import do_bench

    return lambda run: do_bench(run, warmup=5, rep=25, return_mode="median")


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
