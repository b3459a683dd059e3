"""Compile the GPU kernels for a Hopper GPU, on a machine that need not have one; print what came out, a line of JSON each.

A process of its own, without Triton's interpreter: python -m tests.contract.compiled_for_a_gpu
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from evennorm.core.activation import Activation
from evennorm.core.call import Call
from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments
from evennorm.torch.gpu import triton_kernel
from evennorm.torch.tensors import NAMES, acc_dtype

HOPPER = GPUTarget("cuda", 90, 32)
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TYPES |= {torch.uint8: "*u8", torch.bool: "*i1", torch.int64: "*i64"}

# shape, dtype, memory format, slope, residual: ResNet-50's, and such as try every way through the kernels
CASES = [
    ("rows, bfloat16", (128, 256, 56, 56), torch.bfloat16, torch.channels_last, 0.0, True),
    ("rows, of a small array, bfloat16", (128, 512, 7, 7), torch.bfloat16, torch.channels_last, 0.0, True),
    ("rows, of the smallest streamed, bfloat16", (8, 64, 14, 14), torch.bfloat16, torch.channels_last, 0.0, False),
    ("rows of few channels, float32", (128, 64, 112, 112), torch.float32, torch.channels_last, 0.0, False),
    ("planes, bfloat16", (128, 64, 56, 56), torch.bfloat16, torch.contiguous_format, 1.0, False),
    ("small planes on the chip, float32", (128, 512, 7, 7), torch.float32, torch.contiguous_format, 0.0, True),
    ("rows on the chip, float16", (256, 1024), torch.float16, torch.contiguous_format, 0.1, False),
    ("odd rows, float64", (50_001, 3), torch.float64, torch.contiguous_format, 0.0, True),
]


def specialized(function: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """The kernel as Triton compiles it for arguments like these."""
    types, constants, known = {}, {}, {}
    for index, parameter in enumerate(function.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name], known[(index,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            types[parameter.name] = "fp32" if isinstance(value, float) else "i32" if value < 1 << 31 else "i64"
    return ASTSource(function, types, constexprs=constants, attrs=known)


def compiled(name: str, function: JITFunction, *values: Any, grid: Any, **options: Any) -> None:
    arguments = dict(zip(function.arg_names, values, strict=False))
    arguments |= {key: value for key, value in options.items() if key in function.arg_names}
    settings = {key: options[key] for key in ("num_warps", "enable_fp_fusion") if key in options}
    kernel = triton.compile(specialized(function, arguments), target=HOPPER, options=settings)
    facts = {"case": name, "kernel": function.fn.__name__, "shared": kernel.metadata.shared, **read(kernel.asm["ptx"])}
    print(json.dumps(facts | disassembled(kernel.asm["cubin"])), flush=True)


def read(ptx: str) -> dict[str, int]:
    """Of Triton's program: products and sums that another compiler might contract, fused ones, atomic operations by type."""
    return {
        "contractible": len(re.findall(r"\b(?:mul|add|sub)\.f(?:32|64)\s", ptx)),
        "fused": len(re.findall(r"\bfma\.rn\.f32\s", ptx)),
        "atomic": sorted(set(re.findall(r"\b(?:atom|red)\.\S+", ptx))),
    }


def disassembled(cubin: bytes) -> dict[str, int]:
    """Of the machine code: loads of 16 bytes and others, spilled registers."""
    if not TOOL.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([TOOL, "-sass", file.name], capture_output=True, text=True, check=True)
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", run.stdout)
    loads = [operation for operation in operations if operation.startswith(("LDG.", "LDGSTS."))]
    return {
        "wide loads": sum(operation.endswith(".128") for operation in loads),
        "loads": len(loads),
        "spilled": sum(operation.startswith(("LDL", "STL")) for operation in operations),
    }


def main() -> None:
    kernel = triton_kernel()
    kernel = replace(kernel, gpu=kernel.gpu._replace(processors=lambda device: 132))
    for name, shape, dtype, order, slope, with_residual in CASES:
        JITFunction.run = lambda function, *values, warmup, name=name, **rest: compiled(name, function, *values, **rest)
        x = torch.empty(shape, dtype=dtype, memory_format=order)
        row = torch.empty(shape[1], dtype=acc_dtype(x))
        count = torch.zeros((), dtype=torch.int64)
        running = row, row, row, 0.9, True, count, count
        call = Call(Geometry(shape, 1), NAMES[dtype], 1e-5, Activation(slope))
        _, saved = kernel.forward(call, x, row, row, x if with_residual else None, running=running)
        kernel.backward(call, x, x, row, row, saved, with_residual)
        kernel.moments(call, x)
        sums, _, _ = kernel.gradient_sums(call, x, x, row, row, saved)
        kernel.input_gradient(call, x, x, row, row, saved, sums, row[:1, None])
    kernel.update_running_stats(running, Moments(100, row[None], row[None], row[None]))


if __name__ == "__main__":
    main()
