"""Run the programs of test_tensorflow_replicas.py in forks of one process that has imported TensorFlow: on_forks.py FOLDER

The import takes longer than most of the programs. TensorFlow starts no thread before its first operation, so that what a
fork holds is whole. Each writes what it says to FOLDER/NAME/PROCESS.out, and its exit status to the same with .code.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import tensorflow as tf

from evennorm.tensorflow import synchronized
from tests import loopback
from tests.contract import on_replicas

FORKS = multiprocessing.get_context("fork")
PATIENCE = 240
"""Seconds until a fork is killed."""
APART = ("other channels", "another dtype", "evaluates", "killed")


def together(all_of_them: Any) -> None:
    """Wait for the other processes: one that ends earlier resets the connections of those that still speak to it."""
    try:
        all_of_them.wait(60)
    except BrokenBarrierError:
        print("the other process has not come to its end", flush=True)


def apart(fault: str, all_of_them: Any, process: int) -> None:
    """Normalize on two processes, of which the second has another shape or dtype, or takes no part."""
    options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=8)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    shape, dtype = (4, 3), "float32"
    if process == 1:
        if fault == "other channels":
            shape = (4, 5)
        if fault == "another dtype":
            dtype = "float64"
        if fault == "evaluates":
            together(all_of_them)
            os._exit(0)
        if fault == "killed":
            os.kill(os.getpid(), 9)
    try:
        strategy.run(lambda x: synchronized.batch_norm(x)[0], (tf.ones(shape, dtype),))
        print("no error", flush=True)
    except tf.errors.OpError as error:
        print(error.message, flush=True)
    if fault != "killed":
        together(all_of_them)
    os._exit(0)  # without waiting for the other at TensorFlow's own barrier


def example(_: int) -> None:
    runpy.run_path(str(loopback.ROOT / "examples" / "distributed" / "on_tensorflow.py"), run_name="__main__")


def programs(folder: Path) -> list[tuple[str, int, Callable[[int], None]]]:
    """Their names, how many processes they take, and what each process runs."""
    found: list[tuple[str, int, Callable[[int], None]]] = [
        (f"{number} replicas", 1, lambda _, number=number: on_replicas.main(folder / f"{number}.npz", number))
        for number in sorted({len(split.parts) for split in on_replicas.SPLITS})
    ]
    found += [("alone", 1, example), ("example", 2, example)]
    return found + [(fault, 2, partial(apart, fault, FORKS.Barrier(2))) for fault in APART]


def into(path: Path) -> None:
    """Send all that this process says to a file, that of libraries too."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)


def main(folder: Path) -> None:
    running: dict[int, Path] = {}
    for name, processes, run in programs(folder):
        ports = loopback.free_ports(processes)
        (folder / name).mkdir()
        for process in range(processes):
            number = os.fork()
            if not number:
                into(folder / name / f"{process}.out")
                os.environ.update(loopback.tf_config(ports, process) if processes > 1 else {})
                return run(process)  # and end as any program does
            running[number] = folder / name / f"{process}.code"
        if processes == 1:  # computes for seconds
            wait(running)
    wait(running)
    return None


def wait(running: dict[int, Path]) -> None:
    """Until all have ended, or are killed."""
    end = time.monotonic() + PATIENCE
    while running:
        for number in list(running):
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                running.pop(number).write_text(str(os.waitstatus_to_exitcode(status)))
            elif time.monotonic() > end:
                os.kill(number, 9)
        time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
