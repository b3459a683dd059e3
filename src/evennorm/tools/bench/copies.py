"""Copy an array into fresh memory as fast as possible: the limit of what can be measured."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from evennorm.kernels import cpu
from evennorm.tools.bench.contestants import Calls, NotServed

ALONE_BELOW = 1 << 22
"""Bytes below which one thread copies faster than several can start."""


def cheap_copy(x: np.ndarray) -> Calls:
    """Return copies by the compiled kernels' allocation, for engines that cannot allocate that way.

    Raises:
        NotServed: the compiled kernels are not installed.
    """
    compiled = getattr(cpu, "_cpu", None)
    if compiled is None:
        raise NotServed("the compiled kernels, whose memory it takes, are not installed")
    source = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    workers = 1 if source.nbytes < ALONE_BELOW else int(os.environ.get("EVENNORM_NUM_THREADS", "1"))
    parts = [slice(source.size * i // workers, source.size * (i + 1) // workers) for i in range(workers)]
    pool = ThreadPoolExecutor(workers)

    def copy() -> np.ndarray:
        y = np.empty_like(source)
        if y.nbytes >= cpu.HUGE:
            compiled.advise(y.ctypes.data, y.nbytes)
        others = [pool.submit(np.copyto, y[part], source[part]) for part in parts[1:]]
        np.copyto(y[parts[0]], source[parts[0]])
        for other in others:
            other.result()
        return y

    return Calls(copy, None, lambda y: [y.view(x.dtype).reshape(x.shape).astype(np.promote_types(x.dtype, np.float32))])
