"""What the primitives become in a program: calls of the compiled kernels on CPU, the composed form everywhere else.

The composed form also serves masks, programs that are exported (they run anywhere, and may hold no calls that only this
package knows), and arrays that XLA itself spreads over several devices, which it can do to the parts of the composed form
alone. Inside `shard_map` every device has its own array, and the kernels serve.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from evennorm.errors import reason_of
from evennorm.jax import primitives
from evennorm.jax.composed import Names, Options
from evennorm.kernels import parts, xla

TRIED = (0, 10)
"""The newest JAX that the kernels were tried with; native/third_party/xla/README.md says which versions take them."""


def register() -> None:
    """Tells JAX, once."""
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
    """Register the compiled kernels with XLA; False where they are missing, or XLA refuses them.

    What is registered before XLA starts is looked at when it starts, and an error there leaves JAX without a CPU. An unknown
    JAX is therefore asked when the first program is compiled.
    """
    try:
        for name, handler in xla.registrations().items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except Exception as error:  # of a type that differs between versions
        why = f"JAX {jax.__version__} refuses evennorm.kernels._xla: {reason_of(error)}"
        xla.refuse(why, f"install JAX {'.'.join(map(str, TRIED))}, or a newer evennorm")
    return xla.AVAILABLE


def _register(primitive: Primitive, composed: Callable[..., Any], on_cpu: Callable[..., Any] | None) -> None:
    mlir.register_lowering(primitive, composed)
    if on_cpu is None:
        return

    def choose(ctx: Any, *operands: Any, **params: Any) -> Any:
        ready = kernels_are_registered()
        if not ready:
            parts.warn_once("jax")
        call = on_cpu(**params) if ready and _kernel_may_serve(ctx, params["given"], params["options"]) else None
        return (composed if call is None else call)(ctx, *operands, **({} if call else params))

    mlir.register_lowering(primitive, choose, platform="cpu")


def _kernel_may_serve(ctx: Any, given: Names, options: Options) -> bool:
    module = ctx.module_context
    if options.kernel != "cpu" or "mask" in given or getattr(module.lowering_parameters, "for_export", False):
        return False
    return not _spread_by_xla(module.axis_context)


def _spread_by_xla(axis_context: Any) -> bool:
    manual = getattr(axis_context, "manual_axes", None)
    if manual is not None:
        return set(manual) != set(axis_context.mesh.axis_names)
    return getattr(axis_context, "num_devices", 1) != 1


def _forward(given: Names, linear: Names, options: Options, wanted: Names) -> Callable[..., Any]:
    return _call(xla.FORWARD, (given[1:], xla.FORWARD_GIVEN), (wanted, xla.FORWARD_WANTED), options)


def _backward(given: Names, linear: Names, options: Options, wanted: Names) -> Callable[..., Any] | None:
    if "y" not in linear or ("residual" in wanted and "x" not in wanted):
        return None
    operands = (*given[1:], *(f"d_{name}" for name in linear))
    return _call(xla.BACKWARD, (operands, xla.BACKWARD_GIVEN), (wanted, xla.BACKWARD_WANTED), options)


def _call(target: str, given: tuple[Names, Names], wanted: tuple[Names, Names], options: Options) -> Callable[..., Any]:
    lowered = jax.ffi.ffi_lowering(target)
    attributes = {
        "given": np.int64(xla.places(*given)),
        "wanted": np.int64(xla.places(*wanted)),
        "epsilon": np.float64(options.epsilon),
        "negative_slope": np.float64(options.negative_slope),
    }
    return lambda ctx, *operands: lowered(ctx, *operands, **attributes)
