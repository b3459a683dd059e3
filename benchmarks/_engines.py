"""A benchmark and its options go in; what it finds on each Keras engine, in a process of its own, comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENGINES = ("jax", "torch", "tensorflow")


def on_each_engine(script: str, *options: str) -> dict[str, Any]:
    """Runs `script --engine NAME options`, whose last line of output is JSON, on one engine after the other."""
    found = {}
    for engine in ENGINES:
        print(f"{Path(script).stem}: {engine}", file=sys.stderr)
        quiet = {**os.environ, "KERAS_BACKEND": engine, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, script, "--engine", engine, *options]
        run = subprocess.run(command, env=quiet, stdout=subprocess.PIPE, text=True, check=True)
        found[engine] = json.loads(run.stdout.splitlines()[-1])
    return found
