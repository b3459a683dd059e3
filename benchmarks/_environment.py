"""What a measured figure needs beside it: device, versions, commit."""

from __future__ import annotations

from pathlib import Path

from evennorm.tools.bench.machine import commit, device, versions

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, object]:
    return {"device": device(), "versions": versions(), "commit": commit()}


def sentence(environment: dict) -> str:
    """For the foot of a page."""
    listed = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    return f"Measured on {environment['device']}, with {listed}."
