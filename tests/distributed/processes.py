"""Processes of one group on loopback, which run functions of `ranks` at once and answer with what these return.

They are forks of one server that has imported torch, which takes longer than most of the tests.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.loopback import free_ports

PRELOADED = ["tests.distributed.ranks", "torch._inductor.compile_fx"]  # which torch.compile loads, and optimizers in part
PATIENCE = 120
"""Seconds until a test gives up on a process."""


class FailedError(Exception):
    """What a process has raised, by the name of its class and its text."""


class Processes:
    """`size` processes that have joined one gloo group."""

    def __init__(self, size: int, timeout: float = 60.0):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = free_ports(1)[0]
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, timeout, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, name: str, *given: Any) -> list[Any]:
        """Call `ranks.name(*given)` everywhere and return the answers, or raise the first failure."""
        answers = self.answers(name, *given)
        for answer in answers:
            if isinstance(answer, FailedError):
                raise answer
        return answers

    def answers(self, name: str, *given: Any) -> list[Any]:
        """The same, with failures among the answers; None of a process that has died."""
        for pipe in self.pipes:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has died
                pipe.send((name, given))
        return [self._answer(pipe) for pipe in self.pipes]

    def _answer(self, pipe: Any) -> Any:
        if not pipe.poll(PATIENCE):
            self.close()
            raise TimeoutError(f"a process has not answered for {PATIENCE} s")
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            return None

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def processes(size: int, timeout: float = 60.0) -> Iterator[Processes]:
    found = Processes(size, timeout)
    try:
        yield found
    finally:
        found.close()


def _serve(rank: int, size: int, port: int, timeout: float, pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    from tests.distributed import ranks

    while True:
        name, given = pipe.recv()
        try:
            answer = getattr(ranks, name)(*given)
        except BaseException as error:
            answer = FailedError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        pipe.send(answer)
