"""One implementation of moments, normalize and their gradients per kind of device, and the choice between them.

Every kernel has the functions of `kernels.reference`, which define what they compute.
"""

from __future__ import annotations

__all__ = ["choose"]


def choose(engine: str, dtype: str, *, training: bool, inner: object = 1, epsilon: float = 1e-3) -> str:
    """The name of the kernel that serves an array of `dtype` on an engine: a pure function, so that a layer can show it.

    "fused" is TensorFlow's FusedBatchNormV3. At inference, on centred channels-last arrays, it is exact to rounding. In training
    its statistics are not (normalized values off by 5e-3 at mean 1000), so that `core` serves there. cuDNN, which is behind
    it on a GPU, takes no epsilon below 1.001e-5.

    Example:
        >>> choose("tensorflow", "float32", training=False), choose("tensorflow", "float32", training=True)
        ('fused', 'reference')
    """
    exact = not training and dtype in ("float32", "float16", "bfloat16") and inner == 1 and epsilon >= 1.001e-5
    return "fused" if engine == "tensorflow" and exact else "reference"
