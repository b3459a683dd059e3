"""Define the contestants on a GPU: evennorm, F.batch_norm with and without cuDNN and compiled, modules, and a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evennorm.tools.bench.cases import Case
from evennorm.tools.bench.contestants import COPY, EPSILON, LIMIT, OUR_MODULE, OURS, Data, NotServed
from evennorm.tools.bench.on_torch import formula

EAGER, COMPILED, THEIR_MODULE = "torch eager", "torch.compile", "torch modules"
THEIR_MODULES = "nn.BatchNorm, nn.ReLU"

Both = tuple[Callable[[], Any], Callable[[], Any] | None]
"""A function that gives y, and one that gives y and all gradients."""


class Contestant(NamedTuple):
    """One way to normalize, like those of `evennorm.tools.bench.contestants`."""

    name: str
    family: str
    ours: str | None
    prepare: Callable[[Case, Sequence[Data]], list[Both]]
    """Makes the calls for several sets of arrays of one case. It raises NotServed, or an error of the framework."""


def place(case: Case, seed: int, device: str = "cuda") -> Data:
    """Return random tensors on the device: channels on axis 1, and in memory as the layout says."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, wide = getattr(torch, case.dtype), torch.float64 if case.dtype == "float64" else torch.float32

    def images(scale: float = 1.0, mean: float = 0.0) -> Tensor:
        values = torch.empty(case.shape, dtype=dtype, device=device).normal_(mean, scale, generator=generator)
        return values.movedim(-1, 1) if case.layout == "last" else values

    def row(scale: float, mean: float) -> Tensor:
        values = torch.empty(case.channels, dtype=wide, device=device).normal_(mean, scale, generator=generator)
        return values.requires_grad_()

    residual = images().requires_grad_() if case.residual else None
    return Data(images(2.0, 1.0).requires_grad_(), images(), row(0.2, 1.0), row(0.2, 0.0), residual)


def contestants() -> list[Contestant]:
    """Return the contestants, in the order of tables."""
    return [
        Contestant(OURS, OURS, None, _ours),
        Contestant("F.batch_norm, relu", EAGER, OURS, partial(_eager, in_place=False, cudnn=True)),
        Contestant("F.batch_norm, relu_", EAGER, OURS, partial(_eager, in_place=True, cudnn=True)),
        Contestant("F.batch_norm, relu_, no cuDNN", EAGER, OURS, partial(_eager, in_place=True, cudnn=False)),
        Contestant("torch.compile", COMPILED, OURS, _compiled),
        Contestant(OUR_MODULE, OUR_MODULE, None, _our_module),
        Contestant(THEIR_MODULES, THEIR_MODULE, OUR_MODULE, _their_modules),
        Contestant(COPY, LIMIT, None, _copy),
    ]


def _ours(case: Case, sets: Sequence[Data]) -> list[Both]:
    from evennorm.torch import batch_norm

    activation = "relu" if case.relu else None

    def y(data: Data) -> Tensor:
        return batch_norm(
            data.x, data.gamma, data.beta, axis=1, epsilon=EPSILON, activation=activation, residual=data.residual
        )[0]

    return [_both(y, data) for data in sets]


def _eager(case: Case, sets: Sequence[Data], in_place: bool, cudnn: bool) -> list[Both]:
    if in_place and not (case.relu or case.residual):
        if cudnn:
            raise NotServed("with neither activation nor residual it is the same as the one above")
        in_place = False

    def y(data: Data) -> Tensor:
        with torch.backends.cudnn.flags(enabled=cudnn):
            return formula(case, in_place, data.x, data.gamma, data.beta, data.residual)

    return [_both(y, data) for data in sets]


def _compiled(case: Case, sets: Sequence[Data]) -> list[Both]:
    torch.compiler.reset()  # dynamo limits recompilations for one program, not for a list of cases
    compiled = torch.compile(partial(formula, case, False), dynamic=False)
    return [_both(lambda data: compiled(data.x, data.gamma, data.beta, data.residual), data) for data in sets]


def _our_module(case: Case, sets: Sequence[Data]) -> list[Both]:
    import evennorm.torch

    kind = getattr(evennorm.torch, _kind(case))
    layer = kind(case.channels, eps=EPSILON, activation="relu" if case.relu else None).to(sets[0].x.device)
    leaves = {"gamma": layer.weight, "beta": layer.bias}
    return [_both(lambda data: layer(data.x, data.residual), data._replace(**leaves)) for data in sets]


def _kind(case: Case) -> str:
    """Return the name of the layer for an array with this many axes."""
    return {2: "BatchNorm1d", 4: "BatchNorm2d"}[len(case.shape)]


def _their_modules(case: Case, sets: Sequence[Data]) -> list[Both]:
    layer = getattr(torch.nn, _kind(case))(case.channels, eps=EPSILON).to(sets[0].x.device)
    relu = torch.nn.ReLU(inplace=True)

    def y(data: Data) -> Tensor:
        found = layer(data.x)
        if data.residual is not None:
            found = found.add_(data.residual)
        return relu(found) if case.relu else found

    leaves = {"gamma": layer.weight, "beta": layer.bias}
    return [_both(y, data._replace(**leaves)) for data in sets]


def _copy(case: Case, sets: Sequence[Data]) -> list[Both]:
    sources = [data.x.detach() for data in sets]
    targets = [torch.empty_like(x) for x in sources]
    return [(partial(y.copy_, x), None) for x, y in zip(sources, targets, strict=True)]


def _both(y: Callable[[Data], Tensor], data: Data) -> Both:
    leaves = [leaf for leaf in (data.x, data.gamma, data.beta, data.residual) if leaf is not None]

    def both() -> tuple[Tensor, ...]:
        found = y(data)
        return found, *torch.autograd.grad(found, leaves, data.dy)

    return partial(y, data), both
