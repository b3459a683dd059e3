"""Fold the batch normalizations of a model into its other layers, and report where, how exactly and how much faster."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evennorm.errors import InputError, first_line
from evennorm.tools.data import check_fit, open_data
from evennorm.tools.fold import files
from evennorm.tools.fold.difference import TOLERANCES, Difference, Run, difference, repeats
from evennorm.tools.fold.frameworks import FlaxModel, Framework, TorchModel, adapter
from evennorm.tools.fold.inputs import random_batch, shapes_of
from evennorm.tools.fold.report import Report
from evennorm.tools.fold.speed import speed
from evennorm.tools.models import open_model
from evennorm.tools.outputs import refuse_inputs

__all__ = ["Report", "fold"]

Progress = Callable[[str, int, int | None], None]
"""Gets what is being done, how much of it is done, and of how much, where that is known."""

_BATCH = 32


def fold(
    model: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    data: Any = None,
    batches: int = 8,
    input_shape: Sequence[int] | Sequence[Sequence[int]] = (),
    weights: str | os.PathLike[str] | None = None,
    tolerance: float | None = None,
    measure: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Fold the batch normalization of a model into the layers beside it, for inference.

    Before or after a convolution (1-3-D, transposed, grouped, depthwise, separable), a dense layer or an embedding, it
    becomes part of their weights where that is exact; else it becomes one scale and shift. Computed in float64. The outputs
    are compared before anything is written.

    Args:
        model: a keras.Model, a torch.nn.Module or an nnx.Sequential of Flax, a `.keras` or `.h5` file, or `module:function`.
        output: the file to write: `.keras` or `.h5`; `.pt2`, `.safetensors`, `.pt` or `.pth` for torch; `.onnx` for both;
            `.safetensors` for Flax. None to write none.
        data: what to compare the outputs on besides random inputs; anything that `open_data` takes. Torch models are folded
            for the rank of its samples.
        batches: how many batches of 32 samples of it.
        input_shape: of one sample, or a list of those of each input, for torch models that do not show it. They are folded
            for its rank; without it and without data, only what is right for every rank that they were found to run on is
            folded.
        weights: a file to load into the model first.
        tolerance: the largest difference allowed, as a part of the largest output; by default 1e-4 in float32.
        measure: whether to measure the speed.
        progress: is told what is being done, how much of it is done, and of how much, where that is known.

    Returns:
        A record with `layers`, `inputs` (what it holds for), `difference`, `speed` and `folded`, the model.

    Raises:
        InputError: the model or the data cannot be used, or the outputs differ by more than the tolerance; nothing was
            written.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from evennorm.tools.fold import fold
        >>> report = fold(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()), input_shape=(4,), measure=False)
        >>> [(each.layer, each.into) for each in report.layers], report.inputs
        ([('1', ('0',))], 'inputs of rank 2, as (samples, 4)')
    """
    shapes = shapes_of(input_shape)
    progress("opening", 0, None)
    opened = open_model(model, weights)
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"the tolerance is a part of the largest output, 0 or more; received {tolerance}")
    if output is not None:
        files.check(opened.framework, output)
        refuse_inputs(output, {"the model": model, "the data": data, "the file of weights": weights})
    framework = adapter(opened)
    given: Any = None
    if data is not None:
        given = open_data(data, opened.framework)
        check_fit(given, opened)
    random, others = _examples(framework, shapes, given)
    example = random or framework.arrays(given.first(4).x)
    progress("folding", 0, None)
    folded, plan = framework.fold(example, others)
    inputs = _in_words([example, *others])
    before, after = framework.run(opened.model), framework.run(folded)
    allowed = TOLERANCES[framework.dtype] if tolerance is None else tolerance
    progress("comparing", 0, None)
    what = ["random inputs"] if random else []
    found = difference(before, after, [random, *others] if random else [], opened.name)
    if given is not None:
        what.append(given.name)
        found |= _on_data(before, after, given, framework, batches, opened.name, progress)
    if not found.relative <= allowed and not repeats(before, example):
        raise InputError(f"{opened.name} gives other outputs each time, so nothing can be verified; remove its randomness")
    if not found.relative <= allowed:
        raise InputError(
            f"the outputs of {opened.name} differ by {found.largest:.2g} once it is folded, {found.relative:.2g} of the "
            f"largest output, and {allowed:.2g} is allowed; nothing was written; see --tolerance"
        )
    notes = opened.notes
    if not found.varies and plan.folded:
        notes += ("the outputs were the same for all samples, so that comparing them says little; give others by --data",)
    report = Report(
        opened.name,
        opened.framework,
        plan.folded,
        found,
        allowed,
        " and ".join(what),
        None,
        folded,
        notes=notes,
        inputs=inputs,
    )
    if measure:
        progress("measuring", 0, None)
        report = replace(report, speed=speed(before, after, example))
    if output is not None:
        progress("writing", 0, None)
        tensors = framework.tensors(example) if isinstance(framework, TorchModel) else ()
        files.write(opened, folded, output, tensors, inputs)
        report = replace(report, output=os.fspath(output))
    return report


_Arrays = tuple[np.ndarray, ...]


def _examples(framework: Framework, shapes: Sequence[tuple[int, ...]], given: Any) -> tuple[_Arrays, list[_Arrays]]:
    """Return a random batch, and batches of the other ranks that the model takes; none where only the data says what inputs
    are.

    Raises:
        InputError: nobody does, or data say something else than `shapes`.
    """
    if given is None:
        found = framework.inputs(shapes)
        others = [] if shapes else framework.others(found)
        return random_batch(found), [random_batch(each) for each in others]
    said = bool(shapes)
    if isinstance(framework, FlaxModel):
        shapes = shapes or [tuple(framework.arrays(given.first(1).x)[0].shape[1:])]
    if isinstance(framework, TorchModel):
        arrays = framework.arrays(given.first(1).x)
        if reason := framework.failure(arrays):
            raise InputError(f"{given.name} does not fit {framework.opened.name}: {reason}")
        samples = [tuple(array.shape[1:]) for array in arrays]
        if shapes and list(map(len, shapes)) != list(map(len, samples)):
            raise InputError(
                f"--input-shape {' and '.join(','.join(map(str, shape)) for shape in shapes)} and the samples of "
                f"{given.name}, of shape {' and '.join(map(str, samples))}, are of other ranks; leave one of them out"
            )
        if not said and any(array.dtype.kind != "f" for array in arrays):
            return (), []
        shapes = shapes or samples
    try:
        return random_batch(framework.inputs(shapes)), []
    except InputError:
        if said:
            raise
        return (), []


def _in_words(examples: Sequence[_Arrays]) -> str:
    """Describe what a folding is valid for: "inputs of rank 2, as (samples, 4)"."""
    ranks = [" and ".join(str(array.ndim) for array in example) for example in examples]
    shapes = [" and ".join(_shape(array) for array in example) for example in examples]
    return "inputs of rank " + ", and of rank ".join(
        f"{rank}, as {shape}" for rank, shape in zip(ranks, shapes, strict=True)
    )


def _shape(array: np.ndarray) -> str:
    return f"({', '.join(['samples', *map(str, array.shape[1:])])})"


def _on_data(
    before: Run, after: Run, given: Any, framework: Framework, batches: int, name: str, progress: Progress
) -> Difference:
    total = batches if given.samples is None else min(batches, -(-given.samples // _BATCH))

    def read() -> Iterator[tuple[np.ndarray, ...]]:
        for done, batch in enumerate(itertools.islice(given.batches(_BATCH, batches), batches)):
            progress("comparing", done, total)
            yield framework.arrays(batch.x)

    try:
        return difference(before, after, read(), name)
    except InputError:
        raise
    except Exception as error:  # a torch model does not say what it takes
        raise InputError(f"{given.name} does not fit {name}: {first_line(error)}") from error
