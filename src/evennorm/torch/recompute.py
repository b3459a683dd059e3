"""Keep no output of batch normalization for the backward pass inside `recompute_outputs`, and compute it again there.

A convolution after normalization and ReLU keeps its input for its own gradient, and the normalization keeps x. One follows
from the other, by a pass that costs about as much as a copy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from evennorm.core.call import Call
from evennorm.kernels.contract import Kernel

_here = threading.local()
active = 0
"""The number of threads inside `recompute_outputs`: reading it is faster than asking whether this thread is."""


class Recipe:
    """How an output was computed, from tensors that are kept for backward anyway."""

    def __init__(
        self,
        kernel: Kernel,
        call: Call,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | Recipe | None,
        statistics: Tensor,
    ):
        self._kernel, self._call, self._statistics = kernel, call, statistics
        self._x, self._parameters, self._residual = x, (gamma, beta), residual
        self._held = [t for t in (x, residual, gamma, beta) if isinstance(t, Tensor)]
        self._versions = [t._version for t in self._held]

    @property
    def is_chained(self) -> bool:
        """Whether another output has to be recomputed first."""
        return isinstance(self._residual, Recipe)

    def output(self) -> Tensor:
        """Compute the output again.

        Raises:
            RuntimeError: what it is computed from was modified since.
        """
        if [t._version for t in self._held] != self._versions:
            raise RuntimeError(
                "an output of batch normalization cannot be computed again: its input, residual or parameters have been "
                "modified by an inplace operation since the forward pass; clone them before, or leave recompute_outputs"
            )
        residual = self._residual.output() if isinstance(self._residual, Recipe) else self._residual
        with torch.no_grad():
            return self._kernel.forward(self._call, self._x, *self._parameters, residual, statistics=self._statistics)[0]


class _Part(NamedTuple):
    """A substitute for a tensor that was to be saved: an output, or a view of it."""

    recipe: Recipe
    sizes: torch.Size
    strides: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.recipe.output().as_strided(self.sizes, self.strides, self.offset)


class _Outputs:
    """The outputs that can be computed again, by their memory, as long as they own it and nobody has written to it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, int, Recipe]] = {}

    def add(self, y: Tensor, recipe: Recipe) -> None:
        # A weak reference keeps the address of the storage from being given to another, but not its memory.
        memory = StorageWeakRef(y.untyped_storage())
        self._known[memory.cdata] = memory, y._version, recipe

    def recipe_of(self, tensor: Tensor) -> Recipe | None:
        memory, version, recipe = self._known.get(tensor.untyped_storage()._cdata, (None, 0, None))
        return recipe if memory is not None and tensor._version == version else None

    def pack(self, tensor: Tensor) -> Any:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            return tensor
        recipe = self.recipe_of(tensor)
        return tensor if recipe is None else _Part(recipe, tensor.shape, tensor.stride(), tensor.storage_offset())


def _unpack(packed: Any) -> Tensor:
    return packed.tensor() if isinstance(packed, _Part) else packed


@contextmanager
def recompute_outputs() -> Iterator[None]:
    """Keep less for the backward pass of what runs inside: outputs of batch normalization are recomputed when they are
    needed.

    Whatever reads such an output and would keep it (a convolution, a linear layer, pooling) gets it again in the backward
    pass, bit for bit, from x, which batch normalization keeps anyway. Gradients are the same. After a residual that is an
    output itself both are computed again; the third such output in a row is kept, for the next to begin with.

    For outputs that the compiled kernels computed, with the activation and the residual that were fused. An activation of
    its own, a mask, and programs of `torch.compile`, which decides by itself what to compute twice, keep what they kept.
    Inside `torch.utils.checkpoint` that decides. Costs about a copy for each output.

    Raises:
        RuntimeError: in the backward pass, where an input was modified in place after it was normalized.

    Source: recomputation, Chen et al. 2016, arXiv 1604.06174, of what is cheap to compute.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from evennorm.torch import BatchNorm2d, recompute_outputs
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 8, 3))
        >>> with recompute_outputs():
        ...     loss = model(torch.randn(2, 3, 8, 8)).square().mean()
        >>> loss.backward()
    """
    global active
    before = getattr(_here, "outputs", None)
    active += 1
    _here.outputs = outputs = _Outputs()
    try:
        with torch.autograd.graph.saved_tensors_hooks(outputs.pack, _unpack):
            yield
    finally:
        _here.outputs = before
        active -= 1


def recomputing() -> bool:
    """Return whether this is inside `recompute_outputs`."""
    return getattr(_here, "outputs", None) is not None


def remember(
    y: Tensor,
    kernel: Kernel,
    call: Call,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    statistics: Sequence[Tensor],
) -> None:
    """Note how `y` was computed from tensors that are kept for its own gradient."""
    outputs: _Outputs = _here.outputs
    if not y.requires_grad:
        return
    again = None if residual is None else outputs.recipe_of(residual)
    if again is not None and again.is_chained:
        return  # so that no backward pass recomputes a whole chain for each of its outputs
    mean = statistics[0].detach()  # the first of three in a row, which are kept for the gradient anyway
    packed = mean.as_strided((len(statistics), *mean.shape), (mean.numel(), *mean.stride()))
    addend = again or (None if residual is None else residual.detach())
    outputs.add(y, Recipe(kernel, call, x.detach(), gamma, beta, addend, packed))
