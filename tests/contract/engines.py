"""Every engine that serves batch normalization, eager and compiled, behind two functions on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from evennorm.core.moments import Moments
from tests.cases import Case

Arrays = dict[str, np.ndarray | None]


class EngineUnderTest:
    """An engine in one way of running it. `dtype` names a float dtype of any engine."""

    def __init__(self, name: str):
        self.name = name
        self.module_name, _, self.mode = name.partition(" ")

        self.module = import_module(f"evennorm.{self.module_name}")

    def forward(self, case: Case, arrays: Arrays, dtype: str, **options: Any) -> tuple[np.ndarray, Any]:
        """y and the moments as float64 NumPy arrays."""
        tensors, names = self._tensors(arrays, dtype)

        def compute(*values: Any) -> Any:
            y, moments = self.module.batch_norm(**self._arguments(case, names, values, options))
            return (y, *moments)

        y, *moments = self._run(compute, tensors)
        return self._numpy(y), Moments(*map(self._numpy, moments))

    def backward(self, case: Case, arrays: Arrays, dtype: str, **options: Any) -> list[np.ndarray]:
        """Derivatives of sum(y * dy) by x, gamma, beta and, where given, residual, by the engine's own differentiation."""
        tensors, names = self._tensors(arrays, dtype)
        wanted = [name for name in ("x", "gamma", "beta", "residual") if name in names]

        def loss(*values: Any) -> Any:
            given = dict(zip(names, values, strict=True))
            y, _ = self.module.batch_norm(**self._arguments(case, names, values, options))
            return (y * given["dy"]).sum() if self.module_name == "torch" else self.module.xp.sum(y * given["dy"], None)

        return [self._numpy(g) for g in self._gradient(loss, tensors, [names.index(name) for name in wanted])]

    def _arguments(self, case: Case, names: list[str], values: Any, options: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in zip(names, values, strict=True) if name != "dy"}
        return {**given, "axis": case.axis, "epsilon": case.epsilon, "virtual_batch_size": case.group, **options}

    def _tensors(self, arrays: Arrays, dtype: str) -> tuple[list[Any], list[str]]:
        names = [name for name, value in arrays.items() if value is not None]
        half = dtype in ("float16", "bfloat16")
        types = {"mask": "bool"} | dict.fromkeys(("gamma", "beta"), "float32" if half else dtype)
        return [self._tensor(arrays[name], types.get(name, dtype)) for name in names], names

    def _tensor(self, value: np.ndarray, dtype: str) -> Any:
        if self.module_name == "torch":
            import torch

            return torch.tensor(value, dtype=getattr(torch, dtype))
        if self.module_name == "tensorflow":
            import tensorflow as tf

            return tf.constant(value, dtype=getattr(tf, dtype))
        if self.module_name == "jax":
            import jax.numpy as jnp

            return jnp.asarray(value, dtype=dtype)
        return np.asarray(value, dtype=dtype)

    def _numpy(self, value: Any) -> np.ndarray:
        if self.module_name == "torch" and hasattr(value, "detach"):
            value = value.detach().double()
        return np.asarray(value).astype(np.float64)

    def _run(self, compute: Callable[..., Any], tensors: list[Any]) -> Any:
        return self._compiled(compute)(*tensors)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.mode == "jit":
            import jax

            return jax.jit(function)
        if self.mode in ("function", "xla"):
            import tensorflow as tf

            return tf.function(function, jit_compile=self.mode == "xla", autograph=False)
        if self.mode == "function, unknown sizes":
            return self._of_unknown_sizes(function)
        if self.mode == "compile":
            import torch

            torch.compiler.reset()  # else the axis of one case and that of the next become a symbol
            return torch.compile(function, fullgraph=True)
        return function

    @staticmethod
    def _of_unknown_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
        import tensorflow as tf

        def run(*tensors: Any) -> Any:
            # Only x and what has its shape may be of unknown size; the channel may not, and stands last in these cases.
            rank = len(tensors[0].shape)
            specs = [
                tf.TensorSpec([None] * (rank - 1) + [t.shape[-1]] if len(t.shape) == rank else t.shape, t.dtype)
                for t in tensors
            ]
            return tf.function(function, input_signature=specs, autograph=False)(*tensors)

        return run

    def _gradient(self, loss: Callable[..., Any], tensors: list[Any], wanted: list[int]) -> list[Any]:
        if self.module_name == "jax":
            import jax

            return list(self._compiled(jax.grad(loss, tuple(wanted)))(*tensors))
        if self.module_name == "torch":
            import torch

            tensors = [t.requires_grad_() if i in wanted else t for i, t in enumerate(tensors)]
            return list(torch.autograd.grad(self._compiled(loss)(*tensors), [tensors[i] for i in wanted]))
        import tensorflow as tf

        def gradient(*values: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch([values[i] for i in wanted])
                result = loss(*values)
            return tape.gradient(result, [values[i] for i in wanted])

        return self._compiled(gradient)(*tensors)


ENGINES = {
    name: EngineUnderTest(name)
    for name in (
        "numpy",
        "jax",
        "jax jit",
        "torch",
        "torch compile",
        "tensorflow",
        "tensorflow function",
        "tensorflow function, unknown sizes",
        "tensorflow xla",
    )
}
