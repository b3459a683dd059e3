"""Lower the primitives to calls of the compiled kernels on CPU, and to the composed form everywhere else.

The composed form also computes masks, programs that are exported (they run anywhere, and may hold no calls that only this
package knows), and some arrays that XLA itself spreads over several devices; `partitioned` handles the others. Inside
`shard_map` every device has its own array, and the kernels compute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from evennorm.errors import reason_of
from evennorm.jax import composed, partitioned, primitives
from evennorm.jax.composed import Names, Options
from evennorm.kernels import parts, xla

TRIED = (0, 10)
"""The newest JAX that the kernels were tried with; native/third_party/xla/README.md says which versions work."""


def register() -> None:
    """Register the lowerings with JAX, once."""
    if jax.__version_info__[:2] <= TRIED:
        kernels_are_registered()
    for primitive, compose, on_cpu in (
        (primitives.forward_p, primitives.compose_forward, _forward),
        (primitives.tangent_p, primitives.compose_tangent, None),
        (primitives.backward_p, primitives.compose_backward, _backward),
    ):
        _register(primitive, mlir.lower_fun(compose, multiple_results=True), on_cpu)


@cache
def kernels_are_registered() -> bool:
    """Register the compiled kernels with XLA; return False where they are missing, or XLA refuses them.

    What is registered before XLA starts is looked at when it starts, and an error there leaves JAX without a CPU. An unknown
    JAX is therefore asked when the first program is compiled.
    """
    try:
        for name, handler in xla.registrations().items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except Exception as error:  # its type differs between versions
        why = f"JAX {jax.__version__} refuses evennorm.kernels._xla: {reason_of(error)}"
        xla.refuse(why, f"install JAX {'.'.join(map(str, TRIED))}, or a newer evennorm")
    return xla.AVAILABLE


def _register(primitive: Primitive, as_composed: Callable[..., Any], on_cpu: Callable[..., Any] | None) -> None:
    mlir.register_lowering(primitive, as_composed)
    if on_cpu is None:
        return

    def choose(ctx: Any, *operands: Any, **params: Any) -> Any:
        ready = kernels_are_registered()
        if not ready:
            parts.warn_once("jax")
        is_supported = ready and _kernel_supports(ctx, params["given"], params["options"])
        if is_supported and _spread_by_xla(ctx.module_context.axis_context):
            call = _on_parts(ctx, **params)
        else:
            call = on_cpu(**params) if is_supported else None
        return (as_composed if call is None else call)(ctx, *operands, **({} if call else params))

    mlir.register_lowering(primitive, choose, platform="cpu")


def _kernel_supports(ctx: Any, given: Names, options: Options) -> bool:
    module = ctx.module_context
    exported = getattr(module.lowering_parameters, "for_export", False)
    return options.kernel == "cpu" and "mask" not in given and not exported


def _spread_by_xla(axis_context: Any) -> bool:
    manual = getattr(axis_context, "manual_axes", None)
    if manual is not None:
        return set(manual) != set(axis_context.mesh.axis_names)
    return getattr(axis_context, "num_devices", 1) != 1


def _on_parts(ctx: Any, given: Names, linear: Names, options: Options, wanted: Names) -> Callable[..., Any] | None:
    """Return a function that runs the kernels on each device's part, where the mesh is known."""
    context, x = ctx.module_context.axis_context, ctx.avals_in[0]
    mesh = getattr(context, "abstract_mesh", None)
    if mesh is None or mesh.empty or options.exchanged or not partitioned.supports(given, linear, wanted, x):
        return None
    cut = partitioned.backward if linear else partitioned.forward
    target = _kernel_of(xla.BACKWARD if linear else xla.FORWARD, options)
    return mlir.lower_fun(lambda *operands: list(cut(target, options, given, wanted)(*operands)), multiple_results=True)


def _kernel_of(target: str, options: Options) -> partitioned.Kernel:
    """Return a call of compiled code for use in a program that is traced."""
    places = {
        xla.FORWARD: (xla.FORWARD_GIVEN, xla.FORWARD_WANTED),
        xla.BACKWARD: (xla.BACKWARD_GIVEN, xla.BACKWARD_WANTED),
    }

    def run(given: Names, arrays: composed.Arrays, wanted: Names) -> composed.Arrays:
        x = arrays["x"]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        groups, _, channel, _ = x.shape
        row = jax.ShapeDtypeStruct((channel,), wide)
        statistic = jax.ShapeDtypeStruct((groups, channel), wide)
        like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
        types = {"gamma": row, "beta": row, "mean": statistic, "mean_low": statistic, "variance": statistic}
        in_order, out_order = places[target]
        attributes = _attributes((given[1:], in_order), (wanted, out_order), options)
        call = jax.ffi.ffi_call(target, [types.get(name, like_x) for name in wanted])
        return dict(zip(wanted, call(*(arrays[name] for name in given), **attributes), strict=True))

    return run


def _forward(given: Names, linear: Names, options: Options, wanted: Names) -> Callable[..., Any]:
    return _call(xla.FORWARD, (given[1:], xla.FORWARD_GIVEN), (wanted, xla.FORWARD_WANTED), options)


def _backward(given: Names, linear: Names, options: Options, wanted: Names) -> Callable[..., Any] | None:
    if "y" in linear and options.exchanged:
        return mlir.lower_fun(partial(_backward_by_fixed_stats, given, options, wanted), multiple_results=True)
    if "y" not in linear or options.exchanged or ("residual" in wanted and "x" not in wanted):
        return None
    operands = (*given[1:], *(f"d_{name}" for name in linear))
    return _call(xla.BACKWARD, (operands, xla.BACKWARD_GIVEN), (wanted, xla.BACKWARD_WANTED), options)


def _backward_by_fixed_stats(given: Names, options: Options, wanted: Names, *operands: Any) -> list[Any]:
    """Compute the sums over dz by the kernel; XLA fuses the elementwise rest with the operations around it."""
    saved, dy = dict(zip(given, operands[:-1], strict=True)), operands[-1]
    sums = ("gamma", "beta")
    row = jax.ShapeDtypeStruct((*saved["mean"].shape[:-2], saved["mean"].shape[-1]), saved["mean"].dtype)
    attributes = _attributes(((*given[1:], "d_y"), xla.BACKWARD_GIVEN), (sums, xla.BACKWARD_WANTED), options)
    sum_dz_xhat, sum_dz = (
        found[..., None, :] for found in jax.ffi.ffi_call(xla.BACKWARD, [row, row])(*operands, **attributes)
    )
    linear = {"y": dy, "sum_dz": sum_dz, "sum_dz_xhat": sum_dz_xhat}
    found = composed.over_views(composed.backward)(saved, linear, options, wanted)
    return [found[name] for name in wanted]


def _call(target: str, given: tuple[Names, Names], wanted: tuple[Names, Names], options: Options) -> Callable[..., Any]:
    lowered = jax.ffi.ffi_lowering(target)
    attributes = _attributes(given, wanted, options)
    return lambda ctx, *operands: lowered(ctx, *operands, **attributes)


def _attributes(given: tuple[Names, Names], wanted: tuple[Names, Names], options: Options) -> dict[str, Any]:
    return {
        "given": np.int64(xla.places(*given)),
        "wanted": np.int64(xla.places(*wanted)),
        "epsilon": np.float64(options.epsilon),
        "negative_slope": np.float64(options.activation.slope),
        "limit": np.float64(options.activation.limit),
    }
