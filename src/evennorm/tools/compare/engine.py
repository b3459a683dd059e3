"""Set up the environment for a Keras backend: deterministic and quiet."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from evennorm import __version__
from evennorm.errors import InputError, MissingExtra

ENGINES = ("jax", "torch", "tensorflow")
"""Keras backends that can train, the lightest installation first."""


def choose_engine(asked: str | None = None) -> str:
    """Return the engine that was asked for, else that of Keras in this process or KERAS_BACKEND, else the lightest installed
    one.

    Raises:
        InputError: an engine that Keras does not train on.
        MissingExtra: it is not installed, or none is.

    Example:
        >>> choose_engine("jax")
        'jax'
    """
    keras = sys.modules.get("keras")
    wanted = asked or (keras.config.backend() if keras else os.environ.get("KERAS_BACKEND"))
    if wanted is None:
        wanted = next((engine for engine in ENGINES if importlib.util.find_spec(engine)), None)
        if wanted is None:
            raise MissingExtra("evennorm compare", "demo")
    if wanted not in ENGINES:
        source = "received" if asked else "Keras is set to"
        raise InputError(f"engines that train are {', '.join(ENGINES)}; {source} {wanted!r}; choose one by --engine")
    if importlib.util.find_spec(wanted) is None:
        raise MissingExtra(f"the engine {wanted}", wanted, wanted)
    return wanted


def preset_engine(asked: str | None) -> None:
    """Let a module of the user's that imports Keras load the engine that will be chosen; wrong names are reported later."""
    if "keras" in sys.modules:
        return
    wanted = asked or os.environ.get("KERAS_BACKEND") or next(filter(importlib.util.find_spec, ENGINES), None)
    if wanted in ENGINES and importlib.util.find_spec(wanted) is not None:
        select_engine(wanted)


def select_engine(engine: str) -> None:
    """Make `import keras` load this engine, without chatter and with the same bits every time.

    Raises:
        InputError: Keras is loaded already, with another engine.
    """
    keras = sys.modules.get("keras")
    if keras is not None and keras.config.backend() != engine:
        raise InputError(
            f"Keras runs on {keras.config.backend()} in this process already, so {engine} cannot be selected; "
            f"start a new process with KERAS_BACKEND={engine}"
        )
    os.environ["KERAS_BACKEND"] = engine
    for name, value in {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several workers may share one GPU
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }.items():
        os.environ.setdefault(name, value)
    if engine == "tensorflow":
        import tensorflow

        tensorflow.config.experimental.enable_op_determinism()
    elif engine == "torch":
        import torch

        if torch.cuda.is_available():  # the processor is the only one then
            torch.use_deterministic_algorithms(True, warn_only=True)
    elif "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()


def cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(jobs: int) -> dict[str, str]:
    """Return the environment of one of `jobs` workers, so that together they start no more threads than there are cores."""
    threads = str(max(1, cores() // jobs))
    return dict.fromkeys(("OMP_NUM_THREADS", "PJRT_NPROC", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), threads)


def versions(engine: str, framework: str = "keras") -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    found = {"evennorm": __version__} | ({"keras": version("keras")} if framework == "keras" else {})
    for distribution in (engine, f"{engine}-cpu"):
        try:
            return found | {engine: version(distribution)}
        except PackageNotFoundError:
            continue
    return found


def device(engine: str, chosen: str | None = None) -> str:
    """Return the device that the engine trains on, in words, with the machine's processor."""
    if chosen is not None and not chosen.startswith("cuda"):
        place = chosen
    elif engine == "jax":
        import jax

        place = jax.devices()[0].device_kind
    elif engine == "torch":
        import torch

        place = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    else:
        import tensorflow

        gpus = tensorflow.config.list_physical_devices("GPU")
        place = tensorflow.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU") if gpus else "cpu"
    return f"{engine} on {place}; {cores()} cores of {_processor()}{_instructions()}; {platform.system()}"


INSTRUCTION_SETS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sse4_2": "SSE4.2", "sve": "SVE", "asimd": "NEON"}
"""Instruction sets by their flags, the widest first. Engines use the widest; another one adds in another order."""


def _instructions() -> str:
    found = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return next((f" with {name}" for flag, name in INSTRUCTION_SETS.items() if flag in found), "")


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(name: str) -> str:
    """Return the value of a field of /proc/cpuinfo for the first processor; "" on other systems."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.split(":", 1)[0].strip() == name)
    except (OSError, StopIteration):
        return ""
