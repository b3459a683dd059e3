"""Measure batch normalization on this machine: by itself on arrays, and in whole training steps of networks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from evennorm.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from evennorm.tools.bench.processes import Report
    from evennorm.tools.bench.report import Benchmark
    from evennorm.tools.bench.settings import Settings
    from evennorm.tools.bench.steps import NetworkBenchmark, NetworkSettings

__all__ = ["bench", "bench_networks", "measure", "measure_networks"]


def bench(
    engine: str | None = None,
    shapes: str = "usual",
    layouts: Iterable[str] = (),
    dtypes: Iterable[str] = ("float32",),
    activations: Iterable[str] = ("relu",),
    residuals: Iterable[str] = ("no",),
    passes: Iterable[str] = ("forward", "both"),
    against: Iterable[str] | None = None,
    threads: int | None = None,
    rounds: int | None = None,
    each_alone: bool = False,
    progress: Report | None = None,
) -> Benchmark:
    """Measure training-mode batch normalization on this machine's processor, in turns within one process.

    Every call takes fresh memory for its results and gives it back, and both are part of the time. Compilers compile before
    the clock starts. Ratios are those of medians.

    Args:
        engine: torch, jax, tensorflow or numpy; None is that of KERAS_BACKEND, else the first that is installed.
        shapes: "32x56x56x64,8x64x7x7:first" (as they lie in memory; :first has its channels on axis 1), "usual" or "all".
        layouts: some of "last" and "first", into which every shape is brought; none leaves them as written.
        dtypes: some of float32, float64, bfloat16, float16.
        activations: some of "none", "relu".
        residuals: some of "no", "yes": whether an array is added before the activation.
        passes: some of "forward" and "both", which is forward + backward.
        against: families of other layers, such as "torch eager"; None is all of them.
        threads: for the engine; None is as many as there are cores.
        rounds: samples of each figure; None is chosen by time, 9 to 101.
        each_alone: measure again with every contestant in a process of its own. Memory that one of them asks to have in huge
            pages stays so for all others in its process, so that the two protocols differ.
        progress: called with the number of cases done, and of all.

    Raises:
        InputError: a word or number that is none of these, or the engine failed.
        MissingExtra: the engine is not installed.

    Example:
        >>> from evennorm.tools.bench import bench
        >>> found = bench("numpy", "8x16", passes=["forward"], rounds=3)
        >>> [row.contestant for row in found.rows]
        ['evennorm', 'plain NumPy', 'copy', 'copy, cheap pages']
    """
    from evennorm.tools.bench.cases import cases
    from evennorm.tools.bench.machine import cores
    from evennorm.tools.bench.settings import Settings

    settings = Settings(
        chosen_engine(engine),
        tuple(cases(shapes, layouts, dtypes, activations, residuals)),
        tuple(passes),
        None if against is None else tuple(against),
        cores() if threads is None else threads,
        rounds,
        each_alone,
    )
    return measure(settings, progress)


def measure(settings: Settings, progress: Report | None = None) -> Benchmark:
    """Run `bench` for any list of cases.

    Raises:
        InputError: the engine failed.
    """
    from evennorm.tools.bench.machine import environment
    from evennorm.tools.bench.processes import run
    from evennorm.tools.bench.report import Benchmark

    where = environment()
    measured = run(settings, progress or (lambda done, total: None))
    return Benchmark(settings, where, measured.kernels, tuple(measured.rows))


def bench_networks(
    networks: str = "all",
    compiled: bool = False,
    threads: int | None = None,
    rounds: int | None = None,
    progress: Report | None = None,
) -> NetworkBenchmark:
    """Measure whole training steps of networks on this machine's processor, with torch.

    Each network trains with torch's layers, converted by `evennorm.torch.convert`, and without normalization, from the same
    weights and in turns within one process. First steps are measured before that, each in a process of its own.

    Args:
        networks: "mlp:16,article,resnet50:8x224", a batch and the side of images where they are not to be the usual ones;
            `timm:NAME` or `torchvision:NAME`, too; or "all".
        compiled: whether the first two train under `torch.compile`, too.
        threads: for torch and evennorm; None is as many as there are cores.
        rounds: samples of each figure; None is chosen by time, 9 to 101.
        progress: called with the number of networks done, and of all.

    Raises:
        InputError: a word or number that is none of these, or a contestant failed.
        MissingExtra: torch is not installed.

    Example:
        >>> from evennorm.tools.bench import bench_networks
        >>> found = bench_networks("mlp:8", rounds=1)
        >>> [step.contestant for step in found.measured]
        ['torch eager', 'evennorm', 'without normalization']
    """
    from evennorm.tools.bench.machine import cores
    from evennorm.tools.bench.network_cases import parsed_networks
    from evennorm.tools.bench.steps import NetworkSettings

    cases = tuple(parsed_networks(networks))
    settings = NetworkSettings(cases, compiled, cores() if threads is None else threads, rounds)
    return measure_networks(settings, progress)


def measure_networks(settings: NetworkSettings, progress: Report | None = None) -> NetworkBenchmark:
    """Run `bench_networks` for any list of networks.

    Raises:
        InputError: a contestant failed.
        MissingExtra: torch is not installed.
    """
    from evennorm.tools.bench.machine import environment
    from evennorm.tools.bench.network_processes import run
    from evennorm.tools.bench.steps import NetworkBenchmark

    if importlib.util.find_spec("torch") is None:
        raise MissingExtra("measuring networks", "torch", "torch")
    where = environment()
    measured = run(settings, progress or (lambda done, total: None))
    return NetworkBenchmark(settings, where, tuple(measured.steps), measured.fused)


def chosen_engine(asked: str | None) -> str:
    """Return the engine that was asked for, else that of KERAS_BACKEND, else the first that is installed.

    Raises:
        InputError: there is no such engine.
        MissingExtra: it is not installed.
    """
    from evennorm.tools.bench.contestants import ENGINES

    wanted = asked or os.environ.get("KERAS_BACKEND")
    if wanted is None:
        return next(engine for engine in ENGINES if importlib.util.find_spec(engine))  # NumPy always is installed
    if wanted not in ENGINES:
        source = "received" if asked else "KERAS_BACKEND is"
        raise InputError(f"engines are {', '.join(ENGINES)}; {source} {wanted!r}; choose one by --engine")
    if importlib.util.find_spec(wanted) is None:
        raise MissingExtra(f"the engine {wanted}", wanted, wanted)
    return wanted
