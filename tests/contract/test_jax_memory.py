"""Memory that the C library keeps for XLA: what is set, what is said where it cannot be, and that XLA's arrays lie there."""

from __future__ import annotations

import subprocess
import sys

import pytest

from evennorm import ArgumentError
from evennorm.jax import KeptMemory, keep_memory, memory_kept
from evennorm.kernels import parts, xla

IN_A_PROCESS = """
import ctypes
import jax.numpy as jnp
from evennorm.jax import keep_memory, memory_kept

class Malloc(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Malloc
LARGE = 64 << 20

def mapped_by_itself(size=LARGE):
    before = library.mallinfo2().hblkhd
    array = jnp.ones(size // 4, "float32").block_until_ready()
    return library.mallinfo2().hblkhd - before >= size

assert not memory_kept().kept and mapped_by_itself()
assert keep_memory().kept and keep_memory() == memory_kept()
assert not mapped_by_itself()
assert library.mallinfo2().keepcost >= LARGE // 2, "the end of the heap is kept"
assert not keep_memory(False).kept and not memory_kept().kept
assert library.mallinfo2().keepcost < LARGE // 2
assert mapped_by_itself(3 * LARGE), "more than what is free"
print("as it should be")
"""


@pytest.mark.skipif(not xla.allocator()[1], reason="malloc is not glibc's, or the kernels are not built")
def test_arrays_of_xla_are_not_mapped_one_by_one_once_memory_is_kept() -> None:
    run = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, timeout=300)
    assert run.stdout == "as it should be\n", run.stderr[-2000:]


IN_THREADS = """
import ctypes
import sys
import threading

import jax
from evennorm.jax import keep_memory

library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
fields = [(f"_{i}", ctypes.c_size_t) for i in range(10)]
library.mallinfo2.restype = type("Malloc", (ctypes.Structure,), {"_fields_": fields})
LARGE = 100 << 20

def mapped_by_a_thread():
    found = []
    def take():
        library.free(library.malloc(100))
        before = library.mallinfo2()._4  # bytes in pieces that are mapped one by one
        piece = library.malloc(LARGE)
        found.append(library.mallinfo2()._4 - before)
        library.free(piece)
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return found[0]

late = sys.argv[1] == "late"
assert not late or mapped_by_a_thread() >= LARGE
said = keep_memory()
assert said.kept and said.late == late, said
assert ("before the first computation" in str(said)) == late
assert late or mapped_by_a_thread() == 0
print("as it should be")
"""


@pytest.mark.skipif(not xla.allocator()[1], reason="malloc is not glibc's, or the kernels are not built")
@pytest.mark.parametrize("when", ["first", "late"])
def test_threads_keep_arrays_above_64_mb_too_unless_they_ran_before(when: str) -> None:
    run = subprocess.run([sys.executable, "-c", IN_THREADS, when], capture_output=True, text=True, timeout=300)
    assert run.stdout == "as it should be\n", run.stderr[-2000:]


def test_what_is_said_of_another_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "allocator", lambda: ("malloc of /lib/libjemalloc.so", False))
    monkeypatch.setattr(xla, "keep_memory", lambda keep: False)
    assert keep_memory() == memory_kept()
    assert not keep_memory().kept
    why = "keep_memory knows glibc's settings alone, and memory here comes from malloc of /lib/libjemalloc.so"
    assert str(keep_memory()) == f"nothing was changed: {why}"


def test_what_is_said_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "_xla", None)
    monkeypatch.setattr(parts, "_problems", {"_xla": parts.Problem("_xla is not built", "build it")})
    assert keep_memory() == KeptMemory(False, "", "_xla is not built; to mend it, build it")


def test_only_a_truth_value_is_taken() -> None:
    with pytest.raises(ArgumentError, match=r"keep is True or False; received 'yes'"):
        keep_memory("yes")  # type: ignore[arg-type]
