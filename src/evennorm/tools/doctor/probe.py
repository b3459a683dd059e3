"""Look at one framework, in a process of its own, so that nothing wrong with it ends anything else.

`python -m evennorm.tools.doctor.probe jax` prints what it finds as one line of JSON, the last of its output.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from evennorm.errors import ArgumentError, MissingExtra, first_line
from evennorm.kernels import choose, cpu, parts, triton

Found = dict[str, Any]
"""Keys: version, backend, rows (of device, training and inference, the last two by dtype), problems and notes."""

TOLERANCE = 1e-4
"""The largest error for values around 1 in float32."""


def look(name: str) -> Found:
    """Import a framework and evennorm's module for it, compute with both, and tell which kernels they used."""
    found: Found = {"rows": [], "problems": [], "notes": []}
    try:
        framework = import_module(name)
    except Exception as error:
        found["problems"].append(_import_problem(name, error))
        return found
    found["version"] = str(getattr(framework, "__version__", "unknown"))
    try:
        _LOOKS[name](framework, found)
    except ArgumentError as error:  # set in the environment
        _add(found, str(error), "unset it")
    except Exception as error:
        ours = {"flax": "jax.nnx"}.get(name, name)
        _add(
            found, f"evennorm.{ours} does not work with {name} {found['version']}: {first_line(error)}", _other_version(name)
        )
    return found


def _import_problem(name: str, error: Exception) -> parts.Problem:
    if name == "keras" and (getattr(error, "name", None) or "").partition(".")[0] in ("jax", "tensorflow", "torch"):
        try:
            import_module("evennorm.keras")
        except MissingExtra as missing:
            why, _, remedy = str(missing).partition("; ")
            return parts.Problem(why, remedy)
    return parts.Problem(f"{name} cannot be imported: {first_line(error)}", f"install {name} anew")


def _other_version(name: str) -> str:
    extra = f"[{ {'triton': 'gpu'}.get(name, name) }]" if name != "numpy" else ""
    return f"install a version of {name} that evennorm{extra} asks for"


def _look_at_numpy(np: Any, found: Found) -> None:
    _compute("numpy", np.asarray, found)
    _rows("numpy", found)


def _look_at_jax(jax: Any, found: Found) -> None:
    _compute("jax", jax.numpy.asarray, found)
    _rows("jax", found)
    gpus = [device.device_kind for device in jax.devices() if device.platform != "cpu"]
    _rows_without_kernels("JAX", "jax", gpus, found)


def _look_at_torch(torch: Any, found: Found) -> None:
    from evennorm.torch import native

    _compute("torch", torch.as_tensor, found)
    _rows("torch", found)
    missing = parts.problem(native.EXTENSION)
    if missing is not None and find_spec(f"evennorm.kernels.{native.EXTENSION}") is None:
        why = f"calls of modules go through Python, some 60 us longer, without an extension for torch {found['version']}"
        found["notes"].append(parts.Problem(why, missing.remedy))
    elif missing is not None:
        found["problems"].append(missing)
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(0)
        found["rows"].append(_row("torch", gpu, "cuda"))
        reason = triton.missing()
        if reason is not None:
            why, _, remedy = reason.partition("; ")
            _add(found, f"on {gpu}: {why}", f"run {remedy}")


def _look_at_tensorflow(tf: Any, found: Found) -> None:
    from evennorm.tensorflow import compiled

    _compute("tensorflow", tf.convert_to_tensor, found)
    _rows("tensorflow", found, compiled=compiled.AVAILABLE)
    gpus = [device.name for device in tf.config.list_physical_devices("GPU")]
    _rows_without_kernels("TensorFlow", "tensorflow", gpus, found)
    if gpus and compiled.AVAILABLE:
        why = "if TensorFlow sees a GPU, it does not use the compiled kernels on the CPU either"
        found["notes"].append(parts.Problem(why, "set CUDA_VISIBLE_DEVICES= to train on the CPU"))


def _look_at_keras(keras: Any, found: Found) -> None:
    import_module("evennorm.keras")
    found["backend"] = keras.backend.backend()


def _look_at_flax(flax: Any, found: Found) -> None:
    import_module("evennorm.jax.nnx")
    found["backend"] = "jax"


def _look_at_triton(module: Any, found: Found) -> None:
    pass  # only whether it can be imported matters


_LOOKS: dict[str, Callable[[Any, Found], None]] = {
    "numpy": _look_at_numpy,
    "jax": _look_at_jax,
    "torch": _look_at_torch,
    "tensorflow": _look_at_tensorflow,
    "keras": _look_at_keras,
    "flax": _look_at_flax,
    "triton": _look_at_triton,
}


def _compute(engine: str, array: Callable[[Any], Any], found: Found) -> None:
    """Normalize a small array, and compare with the definition in float64."""
    import numpy as np

    x = np.arange(48.0).reshape(16, 3) ** 2 % 17
    y, _ = import_module(f"evennorm.{engine}").batch_norm(array(x.astype("float32")), axis=-1, epsilon=0.01)
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 0.01)
    difference = float(abs(np.asarray(y, "float64") - expected).max())
    if not difference < TOLERANCE:
        why = f"evennorm.{engine}.batch_norm is wrong by {difference:.2g} on a small array"
        _add(found, why, "report it, and set EVENNORM_KERNEL=reference until it is mended")


def _rows(engine: str, found: Found, compiled: bool | None = None) -> None:
    """Add the kernels used on the CPU, and why the compiled ones are not."""
    found["rows"].append(_row(engine, "CPU", "cpu", compiled))
    problem = parts.problem(parts.PARTS[engine])
    if os.environ.get("EVENNORM_KERNEL"):
        problem = parts.Problem("EVENNORM_KERNEL=reference turns the compiled kernels off", "unset it")
    if problem is not None:
        found["problems"].append(problem)


def _rows_without_kernels(name: str, engine: str, gpus: list[str], found: Found) -> None:
    found["rows"] += [_row(engine, gpu, "gpu", False) for gpu in dict.fromkeys(gpus)]
    if gpus:
        why = f"evennorm has no kernels for GPUs under {name}"
        found["notes"].append(parts.Problem(why, "nothing to do; torch has them"))


def _row(engine: str, name: str, device: str, compiled: bool | None = None) -> Found:
    row: Found = {"device": name}
    for words, training in (("training", True), ("inference", False)):
        row[words] = {
            dtype: choose(engine, dtype, training=training, compiled=compiled, device=device) for dtype in cpu.DTYPES
        }
    return row


def _add(found: Found, why: str, remedy: str) -> None:
    found["problems"].append(parts.Problem(why, remedy))


def main() -> None:
    """Print what is found about the framework that the command names."""
    warnings.simplefilter("ignore")
    print(f"\n{json.dumps(look(sys.argv[1]))}", flush=True)
    os._exit(0)  # a framework that fails at exit has answered already


if __name__ == "__main__":
    main()
