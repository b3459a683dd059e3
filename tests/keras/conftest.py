"""Which of these tests run on the Keras backend of this process: NumPy's only infers, TensorFlow's alone has replicas.

Examples and benchmarks, which are programs of Keras alone, run on one.
"""

from pathlib import Path

import keras
import pytest

_HERE = Path(__file__).parent
_BACKEND = keras.backend.backend()
_ONLY = {
    "numpy": {"test_numpy_backend.py"},
    "tensorflow": {"test_layer_replicas.py"},
    "jax": {"test_article_cnn.py", "test_layer_step.py", "test_training_curve.py"},
}


def _left_out() -> list[str]:
    own = _ONLY.get(_BACKEND, set())
    if _BACKEND == "numpy":
        return sorted({path.name for path in _HERE.glob("test_*.py")} - own)
    return sorted(set().union(*_ONLY.values()) - own)


collect_ignore = _left_out()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what was left to runs on other backends."""
    names = f"all but {', '.join(_ONLY['numpy'])}" if _BACKEND == "numpy" else ", ".join(collect_ignore)
    terminalreporter.write_line(f"tests/keras on the {_BACKEND} backend; left to other values of KERAS_BACKEND: {names}")
