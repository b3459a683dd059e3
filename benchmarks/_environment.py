"""What a measured figure needs beside it: device, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("keras", "jax", "torch", "tensorflow", "numpy")


def device() -> str:
    """The processor, as it names itself, and its cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
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
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return described.stdout.strip() or "unknown"


def environment() -> dict[str, object]:
    return {"device": device(), "versions": versions(), "commit": commit()}


def sentence(environment: dict) -> str:
    """For the foot of a page."""
    listed = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    return f"Measured on {environment['device']}, with {listed}."
