"""Say where tests of the GPU kernels run, in Triton's interpreter on CPU tensors or on a GPU, and how exact they are.

Triton reads TRITON_INTERPRET when it is imported, and cannot be imported after TensorFlow: these tests have a process of
their own, `make test-triton`, or `make test-gpu` where there is a GPU. They need torch, Triton, NumPy and pytest only.

The interpreter computes in NumPy. It differs from a GPU in that it rounds to bfloat16 by cutting off, in the order in which
it adds within a tile, and in that it does not pass Python floats as float32.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

ON_GPU = os.environ.get("EVENNORM_TEST_DEVICE") == "cuda"
DEVICE = "cuda" if ON_GPU else "cpu"

if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the GPU kernels are tested in a process of their own: make test-triton", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import torch

from evennorm.torch import gpu, kernels, native, refusal
from evennorm.torch.gpu import triton_kernel

ROUNDING = {"float32": 2e-6, "float64": 1e-11, "float16": 2e-6, "bfloat16": 2e-6}
"""What a value of about 1 may be off by, before it is rounded to half precision."""
LAST_PLACE = {"float32": 0.0, "float64": 0.0, "float16": 2**-11, "bfloat16": 2**-8 if ON_GPU else 2**-7}
"""What that rounding costs, relative to the value."""


class _Supported:
    """The dtypes that the GPU kernels compute."""

    def __contains__(self, dtype: torch.dtype) -> bool:
        return dtype in gpu.SUPPORTED and not refusal.refused(dtype)


@pytest.fixture(autouse=True)
def on_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the GPU kernels compute, from the same draws each time; warnings of earlier tests are forgotten."""
    torch.manual_seed(0)
    monkeypatch.setattr(gpu, "DEVICE", DEVICE)
    monkeypatch.setattr(refusal, "_reasons", {})
    if not ON_GPU:
        monkeypatch.setattr(kernels, "cpu_kernel", triton_kernel())
        monkeypatch.setattr(kernels, "ON_CPU", _Supported())
        monkeypatch.setattr(native, "AVAILABLE", False)


def tensor(values: np.ndarray | None, dtype: str, layout: str = "as it is") -> torch.Tensor | None:
    """On the device; "channels last" in memory where that is meant."""
    if values is None:
        return None
    found = torch.tensor(values, dtype=getattr(torch, dtype), device=DEVICE)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return (
        found.contiguous(memory_format=formats[found.ndim]) if layout == "channels last" and found.ndim in formats else found
    )


def numpy(value: torch.Tensor) -> np.ndarray:
    return value.detach().double().cpu().numpy()


def parameters_of(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"
