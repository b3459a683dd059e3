"""Find out which kernels batch normalization uses here, and why: versions, compiled parts, a trial of each framework."""

from __future__ import annotations

import json
import os
import pkgutil
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import evennorm
from evennorm import kernels
from evennorm.errors import printable
from evennorm.kernels import parts

__all__ = ["Diagnosis", "Framework", "Part", "diagnose"]

FRAMEWORKS = ("numpy", "jax", "torch", "tensorflow", "keras", "flax", "triton")
"""Frameworks by the names under which they are imported; those that compute come before those that build on them."""

SECONDS = 180
"""The most seconds that all frameworks together may take."""

_DISTRIBUTIONS = {"tensorflow": ("tensorflow", "tensorflow-cpu", "tf-nightly")}


@dataclass(frozen=True)
class Framework:
    """What a trial of a framework, in a process of its own, has shown."""

    name: str
    version: str | None = None
    """The version; None where it is not installed."""
    backend: str | None = None
    """The framework that computes for Keras and Flax."""
    rows: tuple[dict[str, Any], ...] = ()
    """For each device, the kernel of each dtype in training and inference."""
    problems: tuple[parts.Problem, ...] = ()
    notes: tuple[parts.Problem, ...] = ()


@dataclass(frozen=True)
class Part:
    """A compiled module of evennorm's."""

    name: str
    serves: str
    built: bool
    problem: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All that `evennorm doctor` shows."""

    evennorm: str
    python: str
    platform: str
    processor: str
    cores: int
    instruction_set: str | None
    """The instruction set that the compiled kernels use; None where they are missing."""
    threads: int
    frameworks: tuple[Framework, ...] = field(default=())
    parts: tuple[Part, ...] = field(default=())

    @property
    def served(self) -> bool:
        """Whether everything that is installed uses compiled kernels."""
        return not any(framework.problems for framework in self.frameworks)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, and the verdict."""
        found = asdict(self)
        for framework in found["frameworks"]:
            for key in ("problems", "notes"):
                framework[key] = [{"why": why, "remedy": remedy} for why, remedy in framework[key]]
        return found | {"served": self.served}


def diagnose(names: Iterable[str] = FRAMEWORKS) -> Diagnosis:
    """Try frameworks, where they are installed, each in a process of its own, and look at the compiled parts.

    Example:
        >>> (numpy,) = diagnose(["numpy"]).frameworks
        >>> numpy.rows[0]["device"]
        'CPU'
    """
    from evennorm.tools.bench.machine import cores, processor

    frameworks = _tried(tuple(names))
    return Diagnosis(
        evennorm=evennorm.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        processor=processor(),
        cores=cores(),
        instruction_set=kernels.cpu._cpu.instruction_set() if kernels.cpu.AVAILABLE else None,
        threads=evennorm.num_threads(),
        frameworks=frameworks,
        parts=_parts([problem.why for framework in frameworks for problem in framework.problems]),
    )


def _tried(names: tuple[str, ...]) -> tuple[Framework, ...]:
    """Start the trials of all that is installed at once, and wait for each."""
    until = time.monotonic() + SECONDS
    with ExitStack() as stack:
        processes = {name: stack.enter_context(_start(name)) for name in names if _installed(name)}
        try:
            return tuple(_outcome(name, processes[name], until) if name in processes else Framework(name) for name in names)
        finally:
            for process in processes.values():
                process.kill()


def _installed(name: str) -> bool:
    try:
        spec = find_spec(name)
    except ValueError:  # not found in any folder
        return True
    return spec is not None and spec.origin is not None


def _start(name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "evennorm.tools.doctor.probe", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
    )


def _outcome(name: str, process: subprocess.Popen[str], until: float) -> Framework:
    try:
        out, complaints = process.communicate(timeout=max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return _failed(
            name, f"{name} did not answer within {SECONDS} seconds", f"try python -X importtime -c 'import {name}'"
        )
    try:
        found = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        code = process.returncode
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        said = [line.strip() for line in complaints.splitlines() if line.strip()]
        return _failed(name, f"{name} ended its process with {ended}{': ' * bool(said)}{''.join(said[-1:])}")
    return Framework(
        name,
        found.get("version") or _version(name),
        found.get("backend"),
        tuple(found["rows"]),
        *(tuple(_problem(*each) for each in found[key]) for key in ("problems", "notes")),
    )


def _failed(name: str, why: str, remedy: str | None = None) -> Framework:
    return Framework(name, _version(name), problems=(_problem(why, remedy or f"install {name} anew"),))


def _problem(why: str, remedy: str) -> parts.Problem:
    return parts.Problem(printable(why)[:500], printable(remedy))


def _version(name: str) -> str:
    for distribution in _DISTRIBUTIONS.get(name, (name,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def _parts(problems: list[str]) -> tuple[Part, ...]:
    """List the compiled parts. What trials say about one is added to what is known here, where it may not be needed."""
    extensions = [module.name for module in pkgutil.iter_modules(kernels.__path__) if module.name.startswith("_torch_")]
    names = {"_cpu": "NumPy, torch", "_xla": "JAX", "_tensorflow": "TensorFlow"}
    names |= {name: f"modules of torch {name.removeprefix('_torch_').replace('_', '.')}" for name in extensions}
    return tuple(_part(name, serves, problems) for name, serves in names.items())


def _part(name: str, serves: str, problems: list[str]) -> Part:
    module = f"evennorm.kernels.{name}"
    known = parts.problem(name)
    said = next((why for why in problems if re.search(rf"{re.escape(module)}\b", why)), known and known.why)
    return Part(name, serves, find_spec(module) is not None, said)
