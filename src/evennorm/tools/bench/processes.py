"""Start one process per engine to measure in, and collect the rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from evennorm.errors import InputError
from evennorm.tools.bench.rows import ALONE, IN_TURNS, Row
from evennorm.tools.bench.settings import Settings

Report = Callable[[int, int], None]
"""A callback that gets the number of cases done, and of all."""


WORKER = "evennorm.tools.bench.worker"
"""The module that measures arrays."""

KILLED = 9
"""The signal by which Linux ends a process when memory runs out."""


class Measured(NamedTuple):
    """The measurements of the processes."""

    rows: list[Row]
    kernels: dict[str, str]
    """The kernel used for each dtype."""


def run(settings: Settings, report: Report) -> Measured:
    """Measure in turns in one process, and, if asked for, each contestant again in a process of its own.

    Raises:
        InputError: the engine is not there, or one of ours failed.
    """
    rows: list[Row] = []
    kernels: dict[str, str] = {}
    names: list[str] = []
    done, total = 0, len(settings.cases) * (1 + settings.each_alone)
    report(done, total)

    def follow(protocol: str, only: str | None, counts: Callable[[], None]) -> None:
        task = {"settings": settings.as_dict(), "protocol": protocol, "only": only}
        for event, detail in events(WORKER, task, environment_for(settings), settings.engine):
            if event == "contestants":
                names[:] = detail
            elif event == "kernels":
                kernels.update(detail)
            elif event == "rows":
                rows.extend(Row.from_dict(row) for row in detail)
                counts()

    def one_case() -> None:
        nonlocal done
        done += 1
        report(done, total)

    follow(IN_TURNS, None, one_case)
    if settings.each_alone:
        for index, name in enumerate(list(names)):
            follow(ALONE, name, lambda: None)
            report(done + len(settings.cases) * (index + 1) // len(names), total)
    return Measured(rows, kernels)


def environment_for(settings: Settings) -> dict[str, str]:
    """Return variables that make the engine quiet, and limit its threads."""
    found = environment_of(settings.threads) | {"KERAS_BACKEND": settings.engine, "TF_CPP_MIN_LOG_LEVEL": "3"}
    if any(case.dtype == "float64" for case in settings.cases):
        found["JAX_ENABLE_X64"] = "1"
    if settings.engine == "jax":
        found["JAX_PLATFORMS"] = "cpu"
    return found


def environment_of(threads: int) -> dict[str, str]:
    """Return the variables that limit the threads of any engine and of evennorm, and find this evennorm again."""
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PJRT_NPROC", "TF_NUM_INTRAOP_THREADS")
    return {
        **os.environ,
        **dict.fromkeys((*variables, "EVENNORM_NUM_THREADS"), str(threads)),
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
    }


def events(module: str, task: dict[str, Any], environment: dict[str, str], engine: str) -> Iterator[tuple[str, Any]]:
    """Yield what a process that runs `module` on `task` reports, line by line; it ends with this generator.

    Raises:
        InputError: it could not measure; its text is the process's own.
    """
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=environment,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        problem = None
        try:
            with suppress(BrokenPipeError):  # it has ended and said why
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.close()
            for line in process.stdout:
                event, detail = json.loads(line)
                if event == "error":
                    problem = detail
                else:
                    yield event, detail
        except BaseException:  # nobody waits for the rest
            process.terminate()
            raise
        code = process.wait()
        if code != 0:
            complaints.seek(0)
            said = [line.strip() for line in complaints.read().splitlines() if line.strip()]
            ended = f"by signal {-code}{', was memory short?' * (code == -KILLED)}" if code < 0 else f"with exit code {code}"
            how = said[-1] if said and code > 0 else f"it ended {ended}"
            raise InputError(problem or f"measuring on {engine} ended early: {how}")
