"""What holds for all tests: the engine of Keras, quiet frameworks, the same draws in every run."""

import gc
import os
import random
import sys
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "agg")
# Threads of torch and of NumPy's OpenBLAS spin while they wait, on cores that others need: a step may take 20 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Half of the time of a test of JAX is XLA's compiler: what it made is there for the next run. Each process of pytest-xdist
# has a folder of its own, since such files are not written atomically; what the first process sets, the others inherit.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    Path(__file__).parents[1] / ".pytest_cache" / "xla" / os.environ.get("PYTEST_XDIST_WORKER", "alone")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("evennorm", deadline=None, derandomize=True, max_examples=60)
settings.register_profile("thorough", settings.get_profile("evennorm"), max_examples=300)  # of make test-all
settings.load_profile("evennorm")

pytest_plugins = ["pytester"]

# Triton's LLVM aborts the process where TensorFlow has loaded its own before; the other way round both live together.
with suppress(ImportError):
    import triton._C.libtriton  # noqa: F401


def pytest_collection_finish() -> None:
    """Frameworks are imported now.

    What they made at their import stays: the garbage collector need not look through it again and again. JAX has read where
    to keep programs; processes that tests start would share the folder, so they compile for themselves.
    """
    for name in [name for name in os.environ if name.startswith(("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE"))]:
        del os.environ[name]
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """A test alone, in its file and in the whole suite starts from the same seeds, so that a failure can be called back."""
    random.seed(0)
    np.random.seed(0)
    if "keras" in sys.modules:  # loaded by the tests that need it; the others are not to wait for it
        sys.modules["keras"].utils.set_random_seed(0)
