"""Replace torch's batch normalization in a model by evennorm's, and revert it."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from evennorm.errors import ArgumentError
from evennorm.torch.conversion import blocks, chains
from evennorm.torch.conversion.exchange import check_plain, exchange, is_ours, obstacle, restore
from evennorm.torch.conversion.fusion import Fusion
from evennorm.torch.conversion.norms import checked, norms

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, fuse: bool = True, inplace: bool = False) -> Model:
    """Return `model` with every batch normalization of torch exchanged for evennorm's, run together with what follows it.

    That is BatchNorm1d, 2d and 3d, the lazy ones, SyncBatchNorm, timm's BatchNormAct2d, and classes derived from these that
    compute as they do. Outputs, gradients and running statistics are the same within rounding, in training and evaluation.

    Modules stay the objects they are, in their places and under their names: a layer's class is exchanged, and a module that
    runs several steps in one gets a class derived from its own. So the keys of the state_dict stay, parameters stay those
    that an optimizer holds, and flags, hooks and attributes stay where they are.

    Args:
        model: any module, before it is wrapped in DataParallel or the like, or compiled.
        fuse: compute a ReLU or LeakyReLU that follows, and an addition in between, in the same step: in an nn.Sequential,
            or in the forward of a module that torch.fx can trace. See `report` for what was done.
        inplace: change `model` itself; else a copy, made by copy.deepcopy.

    Raises:
        ArgumentError: no module; one that is wrapped or compiled; one that cannot be copied.

    Example:
        >>> from torch import nn
        >>> from evennorm.torch import convert
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> type(convert(model)[1]).__module__
        'evennorm.torch.modules'
    """
    model = _own(model, "convert", inplace)
    for _, module, why in list(norms(model)):
        if not why and not is_ours(module) and not obstacle(module):
            exchange(module)
    if fuse:
        Fusion(model).apply(path for path, module, why in norms(model) if is_ours(module) and not why)
    return model


def revert(model: Model, inplace: bool = False) -> Model:
    """Return `model` with every batch normalization of evennorm exchanged for torch's: the way back from `convert`.

    Every module gets its own class again. Parameters, buffers, flags and hooks stay, and the result runs without evennorm.

    Raises:
        ArgumentError: as for `convert`; and a layer that does what torch's cannot: `activation=` or `virtual_batch_size=`.

    Example:
        >>> from torch import nn
        >>> from evennorm.torch import convert, revert
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        >>> type(revert(convert(model))[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    model = _own(model, "revert", inplace)
    found = [(path, module) for path, module, why in norms(model) if is_ours(module) and not why]
    for path, module in found:
        check_plain(module, path)
    for _, module in found:
        restore(module)
    for module in model.modules():
        blocks.unfuse(module)
        chains.unfuse(module)
    return model


def _own(model: Model, verb: str, inplace: bool) -> Model:
    checked(model, verb)
    if inplace:
        return model
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a module holds that cannot be copied
        raise ArgumentError(
            f"{verb} works on a copy of the model, which copy.deepcopy could not make ({error}); change the model itself, "
            f"with {verb}(model, inplace=True)"
        ) from error
