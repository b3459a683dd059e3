"""Several processes of one program that meet on this machine's loopback, for tests of distributed training."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEAN = ROOT / "tests" / "data" / "lean"
"""In place of packages that Keras, and with it TensorFlow, loads at import for seconds and needs for nothing here."""


class Ended(NamedTuple):
    """How a process ended, and what it said."""

    code: int
    out: str
    error: str


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]


def run(
    arguments: Callable[[int], list[str]],
    environment: Callable[[int], dict[str, str]],
    processes: int = 2,
    timeout: float = 300,
) -> list[Ended]:
    """Run Python with the arguments and the environment of each process, until all have ended."""
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *arguments(process)],
            cwd=ROOT,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": f"{ROOT}{os.pathsep}{LEAN}"} | environment(process),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        said = [each.communicate(timeout=timeout) for each in started]
    finally:
        for each in started:
            each.kill()
    return [Ended(each.returncode, *texts) for each, texts in zip(started, said, strict=True)]


def tf_config(ports: list[int], process: int) -> dict[str, str]:
    """TF_CONFIG of one of several workers."""
    workers = [f"localhost:{port}" for port in ports]
    return {"TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": process}})}
