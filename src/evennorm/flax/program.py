"""Run an nnx model as one call, with its batch normalizations to be watched and written.

Nothing follows the code of such a model, so it is one call. Within nnx.jit and nnx.scan values are seen because they run
without a compiler while somebody watches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evennorm.errors import InputError
from evennorm.jax.layers import broadcasting, geometry_of
from evennorm.jax.nnx import assign, modules_of, state_of
from evennorm.models.program import Call, Key, Observer
from evennorm.models.state import BatchNormState

_MODES = ("deterministic", "use_running_average")
"""The attributes that `eval` sets."""


@dataclass(frozen=True)
class ModuleStatistics:
    """The running statistics of one module."""

    path: str
    module: Any
    frozen: bool = False
    """Always False: nnx excludes variables from training through the optimizer, not in the module."""

    def state(self) -> BatchNormState:
        return state_of(self.module, self.path)

    def write(self, mean: np.ndarray, variance: np.ndarray) -> None:
        assign(self.module.mean, mean)
        assign(self.module.var, variance)

    def snapshot(self) -> tuple[Any, Any]:
        return self.module.mean[...], self.module.var[...]

    def restore(self, snapshot: tuple[Any, Any]) -> None:
        self.module.mean[...], self.module.var[...] = snapshot


class Program:
    """The one call of an nnx model in evaluation; see `models.program`.

    Example:
        >>> from flax import nnx
        >>> from evennorm.flax.program import Program
        >>> program = Program(nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0))))
        >>> [call.name for call in program.calls], list(program.layers)
        (['Sequential'], ['layers.1'])
    """

    def __init__(self, model: nnx.Module):
        self.model = model
        self.layers = {path: ModuleStatistics(path, module) for path, module in modules_of(model).items()}
        self.skipped: dict[str, str] = {}
        self.calls = [Call(type(model).__name__, ("input",), ("output",), self._run)]

    def _run(self, values: Mapping[Key, Any]) -> Sequence[Any]:
        return (self._apply(values["input"]),)

    def _apply(self, x: Any) -> Any:
        model: Any = self.model
        if isinstance(x, dict):
            return model(**{name: jnp.asarray(value) for name, value in x.items()})
        return model(*map(jnp.asarray, x if isinstance(x, tuple) else (x,)))

    def begin(self, x: Any) -> dict[Key, Any]:
        return {"input": x}

    def verify(self, x: Any) -> None:
        """Do nothing: the one call is the model."""

    def predict(self, x: Any) -> list[np.ndarray]:
        with self.running():
            return [_to_numpy(leaf) for leaf in jax.tree.leaves(self._apply(x))]

    def apply(self, x: Any) -> list[np.ndarray]:
        return self.predict(x)

    @contextmanager
    def running(self) -> Iterator[None]:
        modules = [module for _, module in nnx.iter_modules(self.model)]
        modes = [(module, name, getattr(module, name)) for module in modules for name in _MODES if hasattr(module, name)]
        try:
            self.model.eval()
            yield
        finally:
            for module, name, mode in modes:
                setattr(module, name, mode)

    @contextmanager
    def watched(self, paths: Sequence[str], observer: Observer) -> Iterator[None]:
        modules = [self.layers[path].module for path in paths]
        kinds: list[Any] = [type(module) for module in modules]
        try:
            for path, module, kind in zip(paths, modules, kinds, strict=True):
                object.__setattr__(module, "__class__", _watched(kind))
                module._evennorm_watch = (path, observer)  # nnx copies an attribute where it makes a new module
            with jax.disable_jit():
                yield
        finally:
            for module, kind in zip(modules, kinds, strict=True):
                object.__setattr__(module, "__class__", kind)
                if hasattr(module, "_evennorm_watch"):
                    del module._evennorm_watch

    def pack(self, value: Any) -> None:
        """Return None: no call follows that needs a value."""

    def unpack(self, packed: Any) -> Any:
        return packed


@cache
def _watched(kind: Any) -> Any:
    """Return a class of modules that show their input before they compute."""

    class Watched(kind):
        def __call__(self, x: Any, *args: Any, **options: Any) -> Any:
            path, observer = self._evennorm_watch
            if isinstance(x, jax.core.Tracer):
                raise InputError(
                    f"{path!r} is called within a transform, such as nnx.vmap or nnx.remat, that shows no values; call it "
                    "without while the model is recalibrated"
                )
            mask = options.get("mask")
            shown = None if mask is None else np.asarray(broadcasting(mask, geometry_of(self, x)))
            observer(path, _to_numpy(x), shown)
            return super().__call__(x, *args, **options)

    return Watched


def _to_numpy(x: Any) -> np.ndarray:
    x = jnp.asarray(x)
    return np.asarray(x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x)
