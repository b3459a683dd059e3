"""Define the contestants on torch: ours; F.batch_norm eagerly, compiled, in oneDNN's format; torch's and Keras's layers;
copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, as torch's own documentation has it
from torch import Tensor

from evennorm.kernels import cpu as kernels
from evennorm.tools.bench import keras_layers
from evennorm.tools.bench.cases import Case
from evennorm.tools.bench.contestants import (
    CHEAP_COPY,
    COPY,
    EPSILON,
    KERAS,
    LIMIT,
    OUR_LAYER,
    OUR_MODULE,
    OURS,
    Calls,
    Contestant,
    Data,
    NotServed,
)


def place(case: Case, data: Data) -> Data:
    """Return the case's tensors as torch's operations take them: channels on axis 1, and in memory as the layout says."""
    dtype = getattr(torch, case.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def tensor(values: np.ndarray | None, dtype: torch.dtype) -> Any:
        return None if values is None else torch.from_numpy(values).to(dtype)

    x, dy, residual = (_channels_second(case, tensor(a, dtype)) for a in (data.x, data.dy, data.residual))
    return Data(_leaf(x), dy, _leaf(tensor(data.gamma, wide)), _leaf(tensor(data.beta, wide)), _leaf(residual))


def contestants() -> list[Contestant]:
    """Return the contestants, in the order of tables."""
    return [
        Contestant(OURS, OURS, None, _ours),
        Contestant("F.batch_norm, relu", "torch eager", OURS, partial(_eager, in_place=False)),
        Contestant("F.batch_norm, relu_", "torch eager", OURS, partial(_eager, in_place=True)),
        Contestant(OUR_MODULE, OUR_MODULE, None, partial(_layer, build=_our_module)),
        Contestant("nn.BatchNorm, nn.ReLU", "torch layer", OUR_MODULE, partial(_layer, build=_their_module)),
        Contestant("torch.compile", "torch.compile", OURS, _compiled),
        Contestant("oneDNN", "oneDNN", OURS, _onednn),
        Contestant(OUR_LAYER, OUR_LAYER, None, partial(_keras, build=keras_layers.ours)),
        Contestant(KERAS, KERAS, OUR_LAYER, partial(_keras, build=keras_layers.theirs)),
        Contestant(COPY, LIMIT, None, _copy),
        Contestant(CHEAP_COPY, LIMIT, None, _cheap_copy),
    ]


def _ours(case: Case, data: Data) -> Calls:
    from evennorm.torch import batch_norm

    activation = "relu" if case.relu else None

    def y() -> Tensor:
        return batch_norm(
            data.x, data.gamma, data.beta, axis=1, epsilon=EPSILON, activation=activation, residual=data.residual
        )[0]

    return _calls(case, y, data)


def formula(case: Case, in_place: bool, x: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None) -> Tensor:
    """Compute a case by torch's own operations."""
    y = F.batch_norm(x, None, None, gamma, beta, training=True, eps=EPSILON)
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    if not case.relu:
        return y
    return F.relu_(y) if in_place else F.relu(y)


def _eager(case: Case, data: Data, in_place: bool) -> Calls:
    if in_place and not (case.relu or case.residual):
        raise NotServed("with neither activation nor residual it is the same as the one above")
    return _calls(case, lambda: formula(case, in_place, data.x, data.gamma, data.beta, data.residual), data)


Step = Callable[[Tensor, Tensor | None], Tensor]
"""A function from x and residual to y."""


def _layer(case: Case, data: Data, build: Callable[[Case, str, Data], tuple[Step, torch.nn.Module]]) -> Calls:
    """Return the calls of modules, which also update running averages."""
    kinds = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}
    if len(case.shape) not in kinds:
        raise NotServed("torch has batch normalization layers for two to five axes")
    step, layer = build(case, kinds[len(case.shape)], data)
    with torch.no_grad():
        layer.weight.copy_(data.gamma)
        layer.bias.copy_(data.beta)
    return _calls(case, lambda: step(data.x, data.residual), data._replace(gamma=layer.weight, beta=layer.bias))


def _our_module(case: Case, kind: str, data: Data) -> tuple[Step, torch.nn.Module]:
    import evennorm.torch

    activation = "relu" if case.relu else None
    layer = getattr(evennorm.torch, kind)(case.channels, eps=EPSILON, dtype=data.gamma.dtype, activation=activation)
    return layer, layer


def _their_module(case: Case, kind: str, data: Data) -> tuple[Step, torch.nn.Module]:
    layer = getattr(torch.nn, kind)(case.channels, eps=EPSILON, dtype=data.gamma.dtype)
    relu = torch.nn.ReLU()

    def step(x: Tensor, residual: Tensor | None) -> Tensor:
        y = layer(x)
        y = y if residual is None else y + residual
        return relu(y) if case.relu else y

    return step, layer


def _compiled(case: Case, data: Data) -> Calls:
    torch.compiler.reset()  # dynamo limits recompilations for one program, not for a list of cases
    compiled = torch.compile(partial(formula, case, False), dynamic=False)
    return _calls(case, lambda: compiled(data.x, data.gamma, data.beta, data.residual), data)


def _onednn(case: Case, data: Data) -> Calls:
    """Return the calls on tensors that are in oneDNN's own format before the clock starts."""
    if case.dtype != "float32" or case.layout != "first" or len(case.shape) != 4:
        raise NotServed("torch trains in oneDNN's format on float32 images with channels first only")
    x, dy, residual = (None if a is None else a.detach().to_mkldnn() for a in (data.x, data.dy, data.residual))
    leaves = Data(_leaf(x), dy, data.gamma, data.beta, _leaf(residual))
    return _calls(case, lambda: formula(case, False, leaves.x, leaves.gamma, leaves.beta, leaves.residual), leaves)


def _keras(case: Case, data: Data, build: Callable[[Case, Data], keras_layers.Built]) -> Calls:
    """Return the calls on the same memory with its axes in Keras's order."""
    detached = Data(*(None if a is None else a.detach() for a in data))
    apply, layer = build(case, detached)
    x, dy, residual = (_as_in_memory(case, a) for a in (detached.x, detached.dy, detached.residual))
    leaves = Data(_leaf(x), dy, layer.gamma.value, layer.beta.value, _leaf(residual))
    return _calls(case, lambda: apply(x, residual), leaves, in_memory_order=True)


def _copy(case: Case, data: Data) -> Calls:
    x = data.x.detach()
    return _calls(case, lambda: x.clone(memory_format=torch.preserve_format))


def _cheap_copy(case: Case, data: Data) -> Calls:
    """Return copies into memory that is allocated as our kernels allocate it."""
    compiled = getattr(kernels, "_cpu", None)
    if compiled is None:
        raise NotServed("the compiled kernels, whose memory it takes, are not installed")
    x = data.x.detach()
    dtype, sizes, strides = kernels.DTYPES[case.dtype], tuple(x.shape), x.stride()

    def copy() -> Tensor:
        if case.bytes < kernels.HUGE:
            return torch.empty_like(x).copy_(x)
        return torch.from_dlpack(compiled.buffer(dtype, sizes, strides)).copy_(x)

    return _calls(case, copy)


def _calls(case: Case, y: Callable[[], Tensor], data: Data | None = None, in_memory_order: bool = False) -> Calls:
    """Return `y` and its gradients by the leaves of `data`; no gradients without data."""

    def values(found: Tensor | tuple[Tensor, ...]) -> list[np.ndarray]:
        arrays = []
        for tensor in (found,) if isinstance(found, Tensor) else found:
            dense = tensor.detach().to_dense() if tensor.layout == torch._mkldnn else tensor.detach()
            dense = _as_in_memory(case, dense) if dense.ndim > 1 and not in_memory_order else dense
            arrays.append(dense.to(torch.promote_types(dense.dtype, torch.float32)).numpy())
        return arrays

    if data is None:
        return Calls(y, None, values)
    leaves = [leaf for leaf in (data.x, data.gamma, data.beta, data.residual) if leaf is not None]

    def both() -> tuple[Tensor, ...]:
        found = y()
        return found, *torch.autograd.grad(found, leaves, data.dy)

    return Calls(y, both, values, partial(saved_bytes, y, leaves[1:3]))


def saved_bytes(y: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Return the bytes that autograd keeps between the passes, each piece of memory once; `parameters` live anyway.

    Example:
        >>> x = torch.zeros(100, requires_grad=True)
        >>> saved_bytes(lambda: x.exp(), []), saved_bytes(lambda: x + 1, [])
        (400, 0)
    """
    kept: dict[Any, int] = {}
    known = {_place(parameter) for parameter in parameters}

    def pack(tensor: Tensor) -> Tensor:
        if _place(tensor) not in known:
            # A part of a tensor keeps all of its memory.
            dense = tensor.layout != torch._mkldnn
            kept[_place(tensor)] = tensor.untyped_storage().nbytes() if dense else tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = y()
    del alive
    return sum(kept.values())


def _place(tensor: Tensor) -> Any:
    return id(tensor) if tensor.layout == torch._mkldnn else tensor.untyped_storage().data_ptr()


def _leaf(tensor: Any) -> Any:
    return None if tensor is None else tensor.requires_grad_()


def _channels_second(case: Case, tensor: Any) -> Any:
    return tensor if tensor is None or case.layout == "first" else tensor.movedim(-1, 1)


def _as_in_memory(case: Case, tensor: Any) -> Any:
    return tensor if tensor is None or case.layout == "first" else tensor.movedim(1, -1)
