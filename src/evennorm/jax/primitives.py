"""Define batch normalization as three JAX primitives, so that derivatives of any order are right and reverse mode runs one
kernel.

`forward` gives y and the statistics. Its derivative by the inputs is linear, and a primitive of its own, `tangent`. The
transpose of that is `backward`, which compiled kernels compute, and whose transpose is `tangent` again. Derivatives of these
two are those of the composed form. The statistics are outputs that carry derivatives, so that second ones pass through them.

Operands stand in the order of `given` + `linear`, results in that of `wanted`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from evennorm.core.activation import LINEAR
from evennorm.jax import composed
from evennorm.jax.composed import Names, Options

STATISTICS = ("mean", "mean_low", "variance")


def outputs(function: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Turn a function of named arrays into one of positional operands."""

    def run(*operands: Any, given: Names, linear: Names, options: Options, wanted: Names) -> list[Any]:
        split = len(given)
        named = dict(zip(given, operands[:split], strict=True)), dict(zip(linear, operands[split:], strict=True))
        found = composed.over_views(function)(*named, options, wanted)
        return [found[name] for name in wanted]

    return run


def _primitive(name: str, function: Callable[..., Any]) -> tuple[Primitive, Callable[..., list[Any]]]:
    primitive, compose = Primitive(f"evennorm_{name}"), outputs(function)
    primitive.multiple_results = True

    @cache
    def compiled(**params: Any) -> Callable[..., list[Any]]:
        return jax.jit(partial(primitive.bind, **params))

    def run(*operands: Any, **params: Any) -> list[Any]:
        return (partial(compose, **params) if jax.config.jax_disable_jit else compiled(**params))(*operands)

    def types(*operands: Any, **params: Any) -> Any:
        """Return the types that the composed form returns, so that symbolic sizes and arrays on a mesh are as JAX has
        them."""
        return list(jax.make_jaxpr(partial(compose, **params))(*operands).out_avals)

    def batched(operands: Any, axes: Any, **params: Any) -> tuple[list[Any], list[int]]:
        size = next(a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None)
        in_front = [
            jnp.broadcast_to(a, (size, *jnp.shape(a))) if axis is None else jnp.moveaxis(a, axis, 0)
            for a, axis in zip(operands, axes, strict=True)
        ]
        results = primitive.bind(*in_front, **params)
        return results, [0] * len(results)

    primitive.def_impl(run)
    primitive.def_abstract_eval(types)
    batching.primitive_batchers[primitive] = batched
    return primitive, compose


forward_p, compose_forward = _primitive("forward", composed.forward)
tangent_p, compose_tangent = _primitive("tangent", composed.tangent)
backward_p, compose_backward = _primitive("backward", composed.backward)


def moves(tangent: Any) -> bool:
    """Return whether a tangent exists and is of real numbers."""
    return not isinstance(tangent, ad.Zero | jax.custom_derivatives.SymbolicZero) and jnp.issubdtype(
        jnp.result_type(tangent), jnp.inexact
    )


def _zero(result: Any) -> Any:
    return ad.Zero(jax.typeof(result).to_tangent_aval())


def _forward_jvp(
    primals: Any, tangents: Any, *, given: Names, linear: Names, options: Options, wanted: Names
) -> tuple[list[Any], list[Any]]:
    by_name = dict(zip(given, primals, strict=True))
    moving = {name: t for name, t in zip(given, tangents, strict=True) if moves(t)}
    keeps_relu_mask = "residual" in given and options.activation != LINEAR
    needed = (*wanted, "relu_mask") if keeps_relu_mask and "relu_mask" not in wanted else wanted
    results = dict(
        zip(needed, forward_p.bind(*primals, given=given, linear=(), options=options, wanted=needed), strict=True)
    )
    saved: dict[str, Any] = {name: by_name[name] for name in ("x", "gamma", "beta") if name in given}
    saved |= {name: results[name] for name in (*STATISTICS, *(("relu_mask",) if keeps_relu_mask else ()))}
    if "mask" in given:
        saved["mask"] = by_name["mask"]
    beside = moving.pop("residual") if "residual" in moving and options.activation == LINEAR else None
    found: dict[str, Any] = {}
    if moving:
        names = ("y", "mean_low", "variance") if "x" in moving else ("y",)
        parameters = {"given": tuple(saved), "linear": tuple(moving), "options": options, "wanted": names}
        found = dict(zip(names, tangent_p.bind(*saved.values(), *moving.values(), **parameters), strict=True))
    if beside is not None:
        beside = beside.astype(results["y"].dtype)
        found["y"] = found["y"] + beside if "y" in found else beside
    moved = [found[name] if name in found else _zero(results[name]) for name in wanted]
    return [results[name] for name in wanted], moved


def _composed_jvp(
    primitive: Primitive, compose: Callable[..., list[Any]], primals: Any, tangents: Any, **params: Any
) -> Any:
    moving = [i for i, t in enumerate(tangents) if moves(t)]

    def along(*some: Any) -> list[Any]:
        operands = list(primals)
        for i, operand in zip(moving, some, strict=True):
            operands[i] = operand
        return compose(*operands, **params)

    _, moved = jax.jvp(along, [primals[i] for i in moving], [tangents[i] for i in moving])
    return primitive.bind(*primals, **params), moved


def _transpose(
    to: Primitive, cotangents: Any, *operands: Any, given: Names, linear: Names, options: Options, wanted: Names
) -> list[Any]:
    arrived = {name: c for name, c in zip(wanted, cotangents, strict=True) if type(c) is not ad.Zero}
    saved, unknown = operands[: len(given)], operands[len(given) :]
    asked = tuple(name for name, o in zip(linear, unknown, strict=True) if ad.is_undefined_primal(o))
    results: dict[str, Any] = {}
    if arrived:
        parameters = {"given": given, "linear": tuple(arrived), "options": options, "wanted": asked}
        results = dict(zip(asked, to.bind(*saved, *arrived.values(), **parameters), strict=True))
    return [None] * len(given) + [results.get(name) for name in linear]


ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[tangent_p] = partial(_composed_jvp, tangent_p, compose_tangent)
ad.primitive_jvps[backward_p] = partial(_composed_jvp, backward_p, compose_backward)
ad.primitive_transposes[tangent_p] = partial(_transpose, backward_p)
ad.primitive_transposes[backward_p] = partial(_transpose, tangent_p)
