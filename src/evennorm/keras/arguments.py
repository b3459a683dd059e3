"""Translate constructor arguments of every Keras version to today's objects."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import keras

from evennorm.core.activation import LINEAR, RELU, RELU6, Activation
from evennorm.core.call import COMPLEX
from evennorm.errors import ArgumentError, ShapeError
from evennorm.keras import initializers


class Default(str):
    """A default that can be told from the same string passed by the user."""


ZEROS, ONES = Default("zeros"), Default("ones")


def initializer(kind: str, new: Any, old: Any) -> Any:
    """Return `beta_initializer` or `beta_init` (`kind` is "beta" or "gamma") as a Keras initializer.

    Raises:
        ArgumentError: both were given, or an old name is unknown.
    """
    if old is None:
        return keras.initializers.get(str(new) if isinstance(new, Default) else new)
    if not isinstance(new, Default):
        raise ArgumentError(
            f"{kind}_init is Keras 1's name for {kind}_initializer and one of them is enough; received "
            f"{kind}_init={old!r} and {kind}_initializer={new!r}"
        )
    return initializers.from_keras_1(old, name=kind)


def regularizer(value: Any) -> Any:
    """Return a regularizer object, a name or a dict of Keras 3 or Keras 1, as a Keras regularizer.

    Keras 1 wrote `{"name": "WeightRegularizer", "l1": 0.0, "l2": 0.01}`; its names `l1`, `l2` and `l1l2` stood for 0.01.
    """
    if value == "l1l2":
        return keras.regularizers.L1L2(l1=0.01, l2=0.01)
    if isinstance(value, Mapping) and value.get("name") in ("WeightRegularizer", "L1L2Regularizer"):
        known = {"name", "l1", "l2"}
        if set(value) - known:
            raise ArgumentError(
                f"a Keras 1 regularizer has the keys name, l1 and l2; received {sorted(set(value) - known)} in {dict(value)}"
            )
        return keras.regularizers.L1L2(l1=float(value.get("l1", 0.0)), l2=float(value.get("l2", 0.0)))
    return keras.regularizers.get(value)


def renorm_clipping(value: Mapping[str, float | None] | None) -> dict[str, float | None]:
    """Return the clipping bounds of batch renormalization, checked."""
    clipping = dict(value or {})
    keys = ["rmax", "rmin", "dmax"]
    if set(clipping) - set(keys):
        raise ArgumentError(f"Received invalid keys for `renorm_clipping` argument: {clipping}. Supported values: {keys}.")
    rmax, rmin, dmax = (clipping.get(key) for key in keys)
    if rmax is not None and rmin is not None and rmax < rmin:
        raise ArgumentError(
            f"rmax should be greater than rmin in the `renorm_clipping` argument. Received: rmax={rmax}, rmin={rmin}."
        )
    if dmax is not None and dmax < 0:
        raise ArgumentError(f"dmax should be non-negative in the `renorm_clipping` argument. Received: dmax={dmax}.")
    return clipping


def momentum(value: float | None) -> float | None:
    """Return the weight of the old average, 0 to 1; None for the average over all batches."""
    return None if value is None else old_weight("momentum", value)


def old_weight(name: str, value: float) -> float:
    """Return the weight of the old average, 0 to 1, in the argument called `name`."""
    if value is None or not 0 <= float(value) <= 1:
        raise ArgumentError(
            f"{name} is the weight of the old average, from 0 to 1 (torch's momentum is 1 minus it); received {name}={value}"
        )
    return float(value)


def mode(value: int) -> int:
    """Return `mode`, Keras 1's argument, checked."""
    if value not in (0, 1, 2):
        raise ArgumentError(
            "mode is 0 (moving statistics at inference), 1 (each sample on its own) or 2 (batch statistics always); "
            f"received mode={value!r}"
        )
    return int(value)


def virtual_batch_size(value: int | None) -> int | None:
    """Return `virtual_batch_size`, the number of samples per ghost batch."""
    if value is None:
        return None
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ArgumentError(
            f"virtual_batch_size counts the samples of a ghost batch, 1 or more; received virtual_batch_size={value!r}"
        )
    return int(value)


def by_name(weights: Sequence[Any] | None, shape: tuple[int, ...], scale: bool, center: bool) -> dict[str, Any]:
    """Return `weights=`, [gamma, beta] or [gamma, beta, mean, variance] of the parameter shape, by the names of the
    variables.

    Raises:
        ArgumentError: another number of arrays, or a layer without gamma or beta.
        ShapeError: an array of another shape.
    """
    if weights is None:
        return {}
    if len(weights) not in (2, 4) or not (scale and center):
        raise ArgumentError(
            "weights holds [gamma, beta] or [gamma, beta, mean, variance] of a layer that has both gamma and beta; received "
            f"{len(weights)} arrays, scale={scale}, center={center}"
        )
    named = dict(zip(("gamma", "beta", "moving_mean", "moving_variance"), weights, strict=False))
    for name, value in named.items():
        if tuple(value.shape) != tuple(shape):
            raise ShapeError(
                f"weights: {name} has one value per channel, shape {tuple(shape)}; received shape {tuple(value.shape)}"
            )
    return named


def fused(activation: Callable[..., Any]) -> Activation | None:
    """Return an activation that kernels fuse; None for every other one."""
    known = {
        keras.activations.linear: LINEAR,
        keras.activations.relu: RELU,
        keras.activations.relu6: RELU6,
        keras.activations.leaky_relu: Activation(0.2),
    }
    return known.get(activation) if isinstance(activation, Hashable) else None


def drop_keras_1_input(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return base layer arguments in which today's names replace Keras 1's `batch_input_shape` and `input_dtype`."""
    kwargs = dict(kwargs)
    shape = kwargs.pop("batch_input_shape", None)
    kwargs.pop("input_dtype", None)
    if shape is not None:
        kwargs.setdefault("input_shape", tuple(shape)[1:])
    return kwargs


def refuse_together(**given: bool) -> None:
    """Refuse two arguments whose meanings contradict each other; the names are those of the arguments."""
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise ArgumentError(
            f"{' and '.join(names)} cannot be combined: each changes what the statistics are taken over; drop one"
        )


def refuse_complex(**given: Any) -> None:
    """Refuse complex tensors or dtypes, naming the argument: a cast to real numbers would drop the imaginary part of each
    value."""
    for name, value in given.items():
        dtype = "" if value is None else keras.backend.standardize_dtype(getattr(value, "dtype", value))
        if dtype.startswith("complex"):
            raise ArgumentError(COMPLEX.format(name=name, dtype=dtype))
