"""Run the training steps of networks: a fresh process for each first step, then one for each network, in turns."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from evennorm.tools.bench.network_cases import NetworkCase
from evennorm.tools.bench.processes import Report, environment_of, events
from evennorm.tools.bench.steps import NetworkSettings, Step

WORKER = "evennorm.tools.bench.training"


class Measured(NamedTuple):
    """The measurements of all processes."""

    steps: list[Step]
    fused: dict[str, dict[str, int]]
    """For each network what `convert` fuses with its normalizations, and how often."""


def run(settings: NetworkSettings, report: Report) -> Measured:
    """Measure every network.

    Raises:
        InputError: torch is not there, or a contestant failed.
    """
    measured = Measured([], {})
    for done, case in enumerate(settings.networks):
        report(done, len(settings.networks))
        steps, fused = _network(settings, case)
        measured.steps.extend(steps)
        measured.fused[str(case)] = fused
    report(len(settings.networks), len(settings.networks))
    return measured


def _network(settings: NetworkSettings, case: NetworkCase) -> tuple[list[Step], dict[str, int]]:
    """Measure one network. Compiled programs are kept on disk: none for a first step, and those of the first steps for the
    turns."""
    task = {"settings": settings.as_dict(), "network": case.as_dict()}
    environment = environment_of(settings.threads)
    first: dict[str, Step] = {}
    times: dict[str, list[float]] = {}
    fused: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        everything = Path(folder, "all")
        for number, contestant in enumerate(settings.contestants):
            cache = Path(folder, str(number))
            own = environment | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
            for _, detail in events(WORKER, task | {"first": contestant}, own, "torch"):
                first[contestant] = Step.from_dict(detail)
            if cache.exists():
                shutil.copytree(cache, everything, dirs_exist_ok=True)
        own = environment | {"TORCHINDUCTOR_CACHE_DIR": str(everything)}
        for event, detail in events(WORKER, task | {"first": None}, own, "torch"):
            if event == "fused":
                fused = detail
            else:
                times = detail
    return [replace(first[name], milliseconds=tuple(times[name])) for name in settings.contestants], fused
