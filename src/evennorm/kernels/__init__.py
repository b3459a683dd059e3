"""Choose between the kernels: one implementation of moments, normalize and their gradients per kind of device.

Every kernel computes what `kernels.reference` defines.
"""

from __future__ import annotations

import os

from evennorm.errors import ArgumentError
from evennorm.kernels import cpu, tensorflow, triton, xla

__all__ = ["choose"]

FORCED = os.environ.get("EVENNORM_KERNEL") or None


def choose(
    engine: str,
    dtype: str,
    *,
    training: bool = True,
    compiled: bool | None = None,
    device: str = "cpu",
    forced: str | None = FORCED,
) -> str:
    """Return the name of the kernel for an array of `dtype` on an engine. It is a pure function, so that a layer can show
    it.

    "cpu" is the compiled one (native/), for arrays in CPU memory without a mask. It supports torch, NumPy, training on JAX,
    whose compiler fuses inference by itself, and training on TensorFlow outside XLA, where the only `device` is "cpu". At
    inference TensorFlow's programs are written for other machines, whose converters know arithmetic and no kernels.

    "triton" is that of GPUs, kernels/triton/, for torch tensors on a `device` of the type "cuda", without a mask.

    `compiled` tells whether the compiled kernel, or Triton, is there (None looks for it; for JAX and TensorFlow it is a
    library of its own); `forced`, from the environment variable EVENNORM_KERNEL, names another.

    Raises:
        ArgumentError: EVENNORM_KERNEL names no kernel.

    Example:
        >>> choose("tensorflow", "float32", training=False), choose("tensorflow", "float32", compiled=True)
        ('reference', 'cpu')
        >>> choose("torch", "bfloat16", compiled=True), choose("torch", "bfloat16", forced="reference")
        ('cpu', 'reference')
        >>> choose("torch", "bfloat16", compiled=True, device="cuda"), choose("jax", "float32", device="cuda")
        ('triton', 'reference')
    """
    if forced is not None:
        if forced != "reference":
            raise ArgumentError(f"EVENNORM_KERNEL is unset, or reference to compare with; received EVENNORM_KERNEL={forced}")
        return forced
    if device == "cuda" and engine == "torch":
        there = triton.AVAILABLE if compiled is None else compiled
        return "triton" if there and dtype in triton.DTYPES else "reference"
    if compiled is None:
        compiled = {"jax": xla, "tensorflow": tensorflow}.get(engine, cpu).AVAILABLE
    is_supported = compiled and device == "cpu" and dtype in cpu.DTYPES and (training or engine not in ("jax", "tensorflow"))
    return "cpu" if is_supported else "reference"
