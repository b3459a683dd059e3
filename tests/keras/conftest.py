"""Which of these tests run on the Keras backend of this process: NumPy's only infers, TensorFlow's alone has replicas."""

from pathlib import Path

import keras
import pytest

_HERE = Path(__file__).parent
_BACKEND = keras.backend.backend()
_NUMPY_ONLY = {"test_numpy_backend.py"}
_TENSORFLOW_ONLY = {"test_layer_replicas.py"}


def _left_out() -> list[str]:
    everything = {path.name for path in _HERE.glob("test_*.py")}
    if _BACKEND == "numpy":
        return sorted(everything - _NUMPY_ONLY)
    return sorted(_NUMPY_ONLY if _BACKEND == "tensorflow" else _NUMPY_ONLY | _TENSORFLOW_ONLY)


collect_ignore = _left_out()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what was left to runs on other backends."""
    names = f"all but {', '.join(_NUMPY_ONLY)}" if _BACKEND == "numpy" else ", ".join(collect_ignore)
    terminalreporter.write_line(f"tests/keras on the {_BACKEND} backend; left to other values of KERAS_BACKEND: {names}")
