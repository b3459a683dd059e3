"""Collect what a measured figure needs beside it: processor, memory, versions, commit, and the kernel that computed."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from evennorm import __version__
from evennorm.tools.bench.settings import Settings

PACKAGES = ("keras", "jax", "torch", "tensorflow", "numpy")


def processor() -> str:
    """Return the processor's own name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device() -> str:
    """Return processor and cores in words."""
    return f"{processor()}, {os.cpu_count()} cores"


def last_cache() -> int | None:
    """Return the bytes of the largest cache of the first core; None where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=None)


def memory() -> int | None:
    """Return the bytes of memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def load() -> float | None:
    """Return the number of processes that wanted to run in the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        for distribution in (package, f"{package}-cpu"):
            try:
                found[package] = version(distribution)
            except PackageNotFoundError:
                continue
            break
    return found


def commit() -> str:
    """Return the commit of the source tree that evennorm is imported from, or "unknown"."""
    home = Path(__file__).resolve().parents[4]
    if not (home / ".git").exists():
        return "unknown"
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=home, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return described.stdout.strip() or "unknown"


def environment() -> dict[str, Any]:
    """Return everything that holds for every engine, as JSON data."""
    return {
        "device": device(),
        "processor": processor(),
        "cores": cores(),
        "memory": memory(),
        "last cache": last_cache(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"evennorm": __version__, **versions()},
        "commit": commit(),
        "load before": load(),
    }


def served_by(settings: Settings) -> dict[str, str]:
    """Return for each dtype the kernel used in training on the engine, with its instruction set where it is compiled."""
    from evennorm.kernels import choose, cpu

    found = {}
    for dtype in dict.fromkeys(case.dtype for case in settings.cases):
        kernel = choose(settings.engine, dtype, training=True)
        compiled = getattr(cpu, "_cpu", None)
        found[dtype] = f"{kernel}, {compiled.instruction_set()}" if kernel == "cpu" and compiled else kernel
    return found
